"""Saves that run during training: what is copied when, who decides on the commit, and what a failure does."""

import errno
import json
import re
import threading
import time

import pytest
import torch

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint import save as checkpoint_save
from ecar_dist.runtime.checkpoint.files import committed, read_manifest, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.world import RemoteError
from tests.runtime.checkpoint.worlds import BATCH, Ranks, State, checkpoints, load, make_config, newest, save, store_of

OLD, NEW = "step-00000004", "step-00000008"


class Gate:
    """Writers wait until the gate opens; a file whose name is in `failing` cannot be written."""

    def __init__(self, monkeypatch, opened=False):
        self.open, self.failing, write = threading.Event(), {}, checkpoint_save.write_tensor_file
        self.written = []
        if opened:
            self.open.set()

        def gated(path, entries, **more):
            assert self.open.wait(60)
            if path.name in self.failing:
                raise self.failing[path.name]
            found = write(path, entries, **more)
            self.written.append(path.name)
            return found

        monkeypatch.setattr(checkpoint_save, "write_tensor_file", gated)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


def make_state(world, config, seed=1):
    state = State(world.rank, world.size, seed)
    return state, ShardedEma(state.partitions, config.ema)


def at(step):
    return Progress(step * BATCH, step)


def settled(store, world):
    """As the training loop does it: all ranks settle in the same step, once all are ready."""
    deadline = time.monotonic() + 60
    while store.in_flight:
        assert time.monotonic() < deadline
        if sum(world.gather(store.ready)) == world.size:
            store.settle()


def test_training_goes_on_during_a_save_and_does_not_change_it(config, gate, tmp_path):
    notes = {"seconds": [1.5]}

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, notes)
            assert (store.in_flight, store.ready, store.last_committed) == (True, False, None)
            assert not committed(tmp_path / "tiny/checkpoints")
            world.barrier()
            state.partitions[0].zero_()
            ema.by_kind["ema"][0].zero_()
            notes["seconds"] = "later"
            gate.open.set()
            settled(store, world)
            assert (store.ready, store.last_committed, store.failures) == (False, 4, 0)
            assert store.bytes_written == sum(
                file.bytes for file in read_manifest(tmp_path / "tiny/checkpoints" / OLD).files
            )

    Ranks(3)(run)
    restored, state, _ = load(config)[0]
    assert torch.equal(state.partitions[0], State(0, 1, seed=1).partitions[0])
    assert restored.client_state == {"seconds": [1.5]}


def test_a_second_save_waits_for_the_first(config, gate, tmp_path):
    opened = []

    def open_gate():
        opened.append(time.monotonic())
        gate.open.set()

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, {})
            if world.is_first:
                threading.Timer(0.3, open_gate).start()
            held = store.stall_seconds
            state.partitions[0].add_(1)
            began = time.monotonic()
            store.begin(at(8), state, ema, {})
            assert store.stall_seconds - held > opened[0] - began - 0.1  # the time that training waited is counted
            assert store.last_committed == 4
            store.finish()

    Ranks(2)(run)
    assert checkpoints(tmp_path) == [OLD, NEW]
    full = State(0, 1, seed=1).full["master"][34:]
    for name, expected in ((OLD, full), (NEW, full + 1)):
        verify(tmp_path / "tiny/checkpoints" / name)
        assert torch.equal(FragmentReader(tmp_path / "tiny/checkpoints" / name).full("master", "c"), expected)


def test_without_overlap_a_save_is_over_when_begin_returns(tmp_path):
    config = make_config(tmp_path, overlap=False)

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, {})
            assert (store.in_flight, store.last_committed) == (False, 4)
            assert committed(tmp_path / "tiny/checkpoints")

    Ranks(2)(run)


def test_a_failure_on_one_rank_is_a_failure_on_all_with_one_warning(config, monkeypatch, tmp_path, capsys):
    gate = Gate(monkeypatch, opened=True)

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, {})
            settled(store, world)
            world.barrier()
            gate.failing = {"state-00001-of-00003.safetensors": OSError(errno.EIO, "Input/output error", "/disk/x")}
            store.begin(at(8), state, ema, {})
            settled(store, world)
            world.barrier()
            assert (store.failures, store.last_committed) == (1, 4)
            with pytest.raises(CheckpointError if world.is_first else RemoteError) as error:
                store.finish()  # the last save of a run must succeed
            assert not world.is_first or re.search("step 8 .* step 4; .*checkpoint.dir", str(error.value))
            gate.failing = {}
            store.begin(at(12), state, ema, {})
            settled(store, world)
            store.finish()
            assert (store.failures, store.last_committed) == (1, 12)

    Ranks(3)(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert re.search("step 8 .* rank 1: cannot write /disk/x: Input/output error; .* step 4; ", line)
    assert checkpoints(tmp_path) == [OLD, "step-00000012"]


def test_the_run_ends_after_max_failures_in_a_row(tmp_path, monkeypatch, capsys):
    config, gate = make_config(tmp_path, max_failures=2), Gate(monkeypatch, opened=True)

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            for step, failing in ((4, True), (8, False), (12, True)):
                world.barrier()
                gate.failing = {"state-00000-of-00002.safetensors": RuntimeError("odd")} if failing else {}
                world.barrier()
                store.begin(at(step), state, ema, {})
                settled(store, world)
            store.begin(at(16), state, ema, {})
            with pytest.raises(CheckpointError if world.is_first else RemoteError) as error:
                settled(store, world)
            return str(error.value)

    message = Ranks(2)(run)[0]
    assert re.search("step 16 .* rank 0: RuntimeError: odd; .* step 8; 2 saves .*checkpoint.dir", message)
    assert len(capsys.readouterr().err.splitlines()) == 2  # for steps 4 and 12


def test_a_commit_that_fails_is_a_failure_and_leaves_nothing(config, monkeypatch, tmp_path):
    save(config)

    def no_rename(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ecar_dist.runtime.checkpoint.folder.os.rename", no_rename)
    with pytest.raises(CheckpointError, match="No space left"):
        save(config, 2, seed=2, step=8)
    assert checkpoints(tmp_path) == [OLD]
    verify(tmp_path / "tiny/checkpoints" / OLD)


def test_files_that_rank_0_does_not_see_are_never_committed(config, monkeypatch, tmp_path):
    save(config)
    write = checkpoint_save.write_tensor_file

    def elsewhere(path, entries, **more):
        written = write(path, entries, **more)
        if "00001-of" in path.name:
            path.unlink()  # as if it were on a disk that only its own node sees
        return written

    monkeypatch.setattr(checkpoint_save, "write_tensor_file", elsewhere)
    said = rf"rank 0: state-00001-of-00002\.safetensors .*{tmp_path}/tiny/checkpoints; set checkpoint.dir"
    with pytest.raises(CheckpointError, match=said):
        save(config, 2, step=8)
    assert checkpoints(tmp_path) == [OLD]


def test_a_commit_that_its_storage_does_not_list_yet_removes_nothing(config, monkeypatch, tmp_path):
    for step in (1, 2, 3):
        save(config, step=step)
    monkeypatch.setattr("ecar_dist.runtime.checkpoint.folder.LocalStorage.complete", lambda _: [("step-00000003", 48)])
    assert save(config, step=4).last_committed == 4
    assert len(checkpoints(tmp_path)) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["master", "exp_avg_sq", "ema"])
def test_numbers_that_are_not_finite_are_never_committed(config, tmp_path, kind, value):
    save(config, 2)

    def run(world):
        state, ema = make_state(world, config)
        if world.rank == 1:
            kinds = {"master": state.partitions, "ema": ema.partitions, "exp_avg_sq": state.moments("exp_avg_sq")}
            kinds[kind][0][3] = value
        with store_of(config, world) as store:
            store.restore(*make_state(world, config))
            store.begin(at(8), state, ema, {})
            store.finish()

    with pytest.raises(CheckpointError, match=f"step 8 was not saved: rank 1: {kind} of . is not finite"):
        Ranks(2)(run)
    assert checkpoints(tmp_path) == [OLD]


def test_an_attempt_that_was_taken_over_does_not_commit(config, tmp_path):
    save(config)
    with pytest.raises(CheckpointError, match=f"^another attempt has taken over {tmp_path}/tiny/checkpoints"):
        save(config, 2, step=8, still_ours=lambda: False)
    assert [path.name for path in committed(tmp_path / "tiny/checkpoints")] == [OLD]


def test_ownership_is_checked_between_the_last_write_and_the_commit(config, tmp_path):
    seen = []

    def still_ours():
        seen.append(
            [sorted(inner.name for inner in path.iterdir()) for path in (tmp_path / "tiny/checkpoints").iterdir()]
        )
        return True

    save(config, step=4, still_ours=still_ours)
    assert seen == [[["COMMITTED", "checkpoint.json", "state-00000-of-00001.safetensors"]]]
    assert checkpoints(tmp_path) == [OLD]


def test_old_checkpoints_that_cannot_be_removed_do_not_undo_a_commit(config, tmp_path, monkeypatch, capsys):
    def no(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("ecar_dist.runtime.checkpoint.folder.LocalStorage.keep_only", no)
    assert save(config).last_committed == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "Permission denied" in line
    assert load(config)[0][0].progress.step == 4


def test_a_roll_back_first_finishes_the_save_under_way(config, gate):
    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, {"bad": 0})
            state.partitions[0][:10].fill_(7)
            threading.Timer(0.2, gate.open.set).start()
            restored = store.restore(state, ema)
            assert (restored.progress, restored.client_state, store.last_committed) == (at(4), {"bad": 0}, 4)
            assert torch.equal(state.partitions[0], State(world.rank, world.size, seed=1).partitions[0])

    Ranks(2)(run)


def test_closing_gives_up_the_save_under_way(config, gate, tmp_path):
    stores = []

    def open_gate():
        for store in stores:
            assert store._stopping.wait(60)
        gate.open.set()

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.begin(at(4), state, ema, {})
            stores.append(store)
            world.barrier()
            if world.is_first:
                threading.Thread(target=open_gate).start()

    Ranks(2)(run)
    assert gate.written == []  # the writer noticed it in the middle of the file
    assert not committed(tmp_path / "tiny/checkpoints")
    assert "checkpoint-writer" not in {thread.name for thread in threading.enumerate()}


def test_buffers_are_allocated_once(config):
    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            store.restore(state, ema)
            buffers = {key: buffer.data_ptr() for key, buffer in store._snapshot._buffers.items()}
            assert len(buffers) == 4
            for step in (4, 8):
                store.begin(at(step), state, ema, {})
                store.finish()
            assert {key: buffer.data_ptr() for key, buffer in store._snapshot._buffers.items()} == buffers

    Ranks(1)(run)


@pytest.mark.parametrize("where", [None, "apart"])
def test_ema_snapshots_are_kept_for_good(tmp_path, where):
    folder = where and str(tmp_path / where)
    config = make_config(tmp_path, keep=2, dir=folder, ema={"half_life_samples": [100, 200]})
    home = tmp_path / "apart/tiny" if where else tmp_path / "tiny/checkpoints"
    copies = home / "ema" if where else tmp_path / "tiny/ema"

    def run(world):
        state, ema = make_state(world, config)
        with store_of(config, world) as store:
            for step in (2, 4, 6, 8):
                ema.by_kind["ema1"][0].fill_(step)
                store.begin(at(step), state, ema, {}, checkpoint=step % 4 == 0, ema_snapshot=True)
                settled(store, world)
            assert store.last_committed == 8

    Ranks(2)(run)
    assert sorted(path.name for path in copies.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    assert [path.name for path in committed(home)] == [NEW, OLD]
    for step in (2, 4, 6, 8):
        verify(copies / f"step-{step:08d}")
        reader = FragmentReader(copies / f"step-{step:08d}")
        assert reader.kinds == {"ema", "ema1"}
        assert torch.equal(reader.full("ema1", "b"), torch.full((10,), float(step)))
    assert json.loads((copies / OLD / "checkpoint.json").read_text())["averages"]["ema1"].startswith("half-life 200")
    assert newest(home).name == NEW
