"""What is on disk: whole or not there, proven before use, and refused when it is another run's."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime import checkpoint as module
from ecar_dist.runtime.checkpoint import CheckpointStore
from ecar_dist.runtime.checkpoint_files import (
    MANIFEST,
    MARKER,
    FragmentReader,
    Progress,
    committed,
    newest,
    verify,
)
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import ADAM_MOMENTS, Fragment
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.world import Placement, World

SHAPES = {"a": (4, 6), "b": (10,), "c": (3,)}


class PartitionedState:
    """The view an Engine gives, on made-up numbers: rank `rank` of `size` holds an even cut of all parameters."""

    replicated, zero_stage, shapes = False, 2, SHAPES

    def __init__(self, rank, size, seed):
        generator = torch.Generator().manual_seed(seed)
        total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
        share = -(-total // size)
        full = {kind: torch.randn(total, generator=generator) for kind in ("master", *ADAM_MOMENTS)}
        padded = {kind: torch.cat((values, torch.zeros(share * size - total))) for kind, values in full.items()}
        mine = {kind: values[rank * share : (rank + 1) * share].clone() for kind, values in padded.items()}
        self.full, self.partitions = full, [mine["master"]]
        self._moments = {kind: [mine[kind]] for kind in ADAM_MOMENTS}
        self.fragments, self.optimizer_step, offset = [], None, 0
        for name, shape in SHAPES.items():
            low, high = max(offset, rank * share), min(offset + torch.Size(shape).numel(), (rank + 1) * share)
            if low < high:
                self.fragments.append(Fragment(name, low - offset, high - low, 0, low - rank * share))
            offset += torch.Size(shape).numel()

    def moments(self, name):
        return self._moments[name]

    def set_optimizer_step(self, step):
        self.optimizer_step = step

    def publish_master_weights(self):
        pass


class OneOf(World):
    """Ranks that write one after the other: what the others would send is put together by the test."""

    def __init__(self, rank, size, folder, entries):
        super().__init__(Placement(rank, size), torch.device("cpu"))
        self._folder, self._entries = folder, entries

    def gather(self, value):
        if isinstance(value, dict):
            self._entries[self.rank] = value
            return [self._entries.get(rank) for rank in range(self.size)]
        return [value]

    def broadcast(self, value):
        return "together" if isinstance(value, str) else committed(self._folder)

    def barrier(self):
        pass


def save_on(folder, size, seed, step, identity=None, keep=3):
    """A checkpoint of `size` ranks; rank 0 commits last."""
    entries = {}
    for rank in reversed(range(size)):
        state = PartitionedState(rank, size, seed)
        store = CheckpointStore(folder, OneOf(rank, size, folder, entries), keep, identity or {"flow.num_stages": 3})
        store.save(Progress(step * 16, step), state, ShardedEma(state.partitions, 100, 1.0))


def restore_on(folder, rank, size, identity=None):
    state = PartitionedState(rank, size, seed=999)
    ema = ShardedEma(state.partitions, 100, 1.0)
    store = CheckpointStore(folder, OneOf(rank, size, folder, {}), 3, identity or {"flow.num_stages": 3})
    return store.restore(state, ema), state, ema


@pytest.mark.parametrize(("written_by", "read_by"), [(1, 1), (3, 2), (2, 5), (4, 1), (1, 7)])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, written_by, read_by):
    save_on(tmp_path, written_by, seed=1, step=4)
    for rank in range(read_by):
        progress, state, ema = restore_on(tmp_path, rank, read_by)
        expected = PartitionedState(rank, read_by, seed=1)
        assert progress == Progress(64, 4)
        assert state.optimizer_step == 4
        for fragment in state.fragments:
            for ours, theirs in [
                (state.partitions, expected.partitions),
                (ema.partitions, expected.partitions),
                *((state.moments(name), expected.moments(name)) for name in ADAM_MOMENTS),
            ]:
                assert torch.equal(fragment.of(ours), fragment.of(theirs))


def test_a_whole_parameter_reads_in_its_own_shape(tmp_path):
    save_on(tmp_path, 3, seed=1, step=4)
    reader = FragmentReader(newest(tmp_path))
    full = PartitionedState(0, 1, seed=1).full["master"]
    assert torch.equal(reader.full("ema", "a"), full[:24].view(4, 6))
    assert torch.equal(reader.full("master", "c"), full[34:])


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert restore_on(tmp_path, 0, 1)[0] is None


def test_a_directory_without_its_marker_does_not_exist(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4)
    save_on(tmp_path, 1, seed=2, step=8)
    (tmp_path / "step-00000008" / MARKER).unlink()
    assert [path.name for path in committed(tmp_path)] == ["step-00000004"]
    assert restore_on(tmp_path, 0, 1)[0].step == 4


def damage_flip(path):
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def damage_cut(path):
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])


def damage_gone(path):
    next(path.glob("*.safetensors")).unlink()


def damage_swapped(path):
    one, other = sorted(path.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def damage_manifest(path):
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["progress"]["samples_seen"] += 16
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_gone, damage_swapped, damage_manifest])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    save_on(tmp_path, 1, seed=1, step=4)
    save_on(tmp_path, 2, seed=2, step=8)
    damage(tmp_path / "step-00000008")
    progress, state, _ = restore_on(tmp_path, 0, 1)
    assert progress.step == 4
    assert torch.equal(state.partitions[0], PartitionedState(0, 1, seed=1).partitions[0])
    warning = capsys.readouterr().err
    assert "step-00000008" in warning
    assert "is damaged" in warning
    with pytest.raises(CheckpointError, match="step-00000008"):
        verify(tmp_path / "step-00000008")
    assert newest(tmp_path).name == "step-00000004"


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4)
    damage_flip(tmp_path / "step-00000004")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        restore_on(tmp_path, 0, 1)


def test_a_checkpoint_of_another_stage_schedule_is_refused(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4, identity={"flow.num_stages": 3})
    with pytest.raises(CheckpointError, match=r"flow\.num_stages=3, this run has flow\.num_stages=2; set it back"):
        restore_on(tmp_path, 0, 1, identity={"flow.num_stages": 2})


def test_a_failed_save_leaves_the_old_checkpoint_and_no_half_new_one(tmp_path, monkeypatch):
    save_on(tmp_path, 1, seed=1, step=4)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecar_dist.runtime.checkpoint.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_on(tmp_path, 1, seed=2, step=8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    verify(tmp_path / "step-00000004")


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save_on(tmp_path, 1, seed=step, step=step, keep=2)
    assert [path.name for path in committed(tmp_path)] == ["step-00000005", "step-00000004"]
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    save_on(tmp_path, 2, seed=1, step=4)
    save_on(tmp_path, 1, seed=2, step=4)
    verify(tmp_path / "step-00000004")
    assert torch.equal(restore_on(tmp_path, 0, 1)[1].partitions[0], PartitionedState(0, 1, seed=2).partitions[0])


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    save_on(tmp_path, 2, seed=1, step=4)
    names = sorted(path.name for path in (tmp_path / "step-00000004").iterdir())
    assert names == [MARKER, MANIFEST, "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"]
    assert set(load_file(tmp_path / "step-00000004" / names[2])) >= {"master:a:0", "exp_avg:a:0", "ema:a:0"}


def test_the_marker_is_written_last_and_the_name_given_after_it(tmp_path, monkeypatch):
    order, sync, rename = [], module.sync_to_disk, os.rename
    monkeypatch.setattr(module, "sync_to_disk", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(module.os, "rename", lambda old, new: (order.append("rename"), rename(old, new)))
    save_on(tmp_path, 1, seed=1, step=4)
    assert order[:3] == ["state-00000-of-00001.safetensors", MANIFEST, MARKER]
    assert order[3].startswith("tmp-step-00000004")
    assert order[4:] == ["rename", tmp_path.name]


def test_damage_seen_by_another_rank_alone_is_damage(tmp_path, monkeypatch):
    save_on(tmp_path, 1, seed=1, step=4)
    save_on(tmp_path, 1, seed=2, step=8)
    gather, calls = OneOf.gather, []

    def first_time_rank_1_objects(self, value):
        calls.append(value)
        return [None, "state-00001 is bad"] if len(calls) == 1 else gather(self, value)

    monkeypatch.setattr(OneOf, "gather", first_time_rank_1_objects)
    assert restore_on(tmp_path, 0, 1)[0].step == 4


def test_a_checkpoint_that_fixes_more_than_this_run_knows_is_refused(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4, identity={"flow.num_stages": 3, "flow.twist": 1})
    with pytest.raises(CheckpointError, match=r"flow\.twist=1, this run has flow\.twist=None"):
        restore_on(tmp_path, 0, 1, identity={"flow.num_stages": 3})


def test_what_a_kill_left_behind_is_removed_by_the_next_save(tmp_path):
    (tmp_path / "tmp-step-00000004-dead").mkdir()
    (tmp_path / "step-00000002").mkdir()  # its marker was gone before its files were
    save_on(tmp_path, 1, seed=1, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_checkpoint_loses_its_marker_before_anything_else(tmp_path, monkeypatch):
    save_on(tmp_path, 1, seed=1, step=1)
    save_on(tmp_path, 1, seed=1, step=2)
    gone, rmtree = [], shutil.rmtree
    monkeypatch.setattr(
        module.shutil, "rmtree", lambda path, **more: (gone.append((path / MARKER).exists()), rmtree(path, **more))
    )
    save_on(tmp_path, 1, seed=1, step=3, keep=2)
    assert gone == [False]


def test_a_gap_in_a_parameter_is_an_error(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4)
    with pytest.raises(CheckpointError, match="holds 24 of 25 values of ema a; it is of another model"):
        FragmentReader(newest(tmp_path)).read("ema", "a", 0, 25)


def test_restored_weights_are_published_after_they_are_read(tmp_path, monkeypatch):
    save_on(tmp_path, 1, seed=1, step=4)
    seen = []
    monkeypatch.setattr(
        PartitionedState, "publish_master_weights", lambda self: seen.append(self.partitions[0].clone())
    )
    restore_on(tmp_path, 0, 1)
    assert torch.equal(seen[0], PartitionedState(0, 1, seed=1).partitions[0])


def test_replicated_state_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(PartitionedState, "replicated", True)
    entries = {}
    for rank in (1, 0):
        state = PartitionedState(0, 1, seed=1)
        store = CheckpointStore(tmp_path, OneOf(rank, 2, tmp_path, entries), 3, {"flow.num_stages": 3})
        store.save(Progress(64, 4), state, ShardedEma(state.partitions, 100, 1.0))
    reader = FragmentReader(newest(tmp_path))
    assert torch.equal(reader.full("master", "c"), PartitionedState(0, 1, seed=1).full["master"][34:])


def test_a_manifest_that_is_no_text_any_more_is_damage(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4)
    save_on(tmp_path, 1, seed=2, step=8)
    content = bytearray((tmp_path / "step-00000008" / MANIFEST).read_bytes())
    content[30] ^= 0x80
    (tmp_path / "step-00000008" / MANIFEST).write_bytes(content)
    assert restore_on(tmp_path, 0, 1)[0].step == 4


def test_a_new_checkpoint_is_never_dropped_for_damaged_ones_ahead_of_it(tmp_path):
    for step in (4, 8, 12):
        save_on(tmp_path, 1, seed=step, step=step)
    damage_flip(tmp_path / "step-00000008")
    damage_flip(tmp_path / "step-00000012")
    save_on(tmp_path, 1, seed=6, step=6, keep=2)
    assert [path.name for path in committed(tmp_path)] == ["step-00000006", "step-00000004"]


def test_a_full_disk_as_safetensors_reports_it(tmp_path):
    save_on(tmp_path, 1, seed=1, step=4)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))  # bytes: the files cannot be written to their ends
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save_on(tmp_path, 1, seed=2, step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_commit_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    save_on(tmp_path, 1, seed=1, step=4)

    def no_rename(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "rename", no_rename)
    with pytest.raises(CheckpointError, match="No space left"):
        save_on(tmp_path, 1, seed=2, step=8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    verify(tmp_path / "step-00000004")


def test_a_start_killed_while_it_claims_the_directory_can_be_made_again(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "run")
    monkeypatch.setattr("pathlib.Path.mkdir", dying_after_two(monkeypatch))
    with pytest.raises(KeyboardInterrupt):
        directory.open_for_training()
    monkeypatch.undo()
    (directory.path / ".lineage.json.host.1.ab.tmp").write_text("")
    directory.open_for_training()
    assert directory.attempts() == []


def dying_after_two(monkeypatch):
    mkdir, calls = Path.mkdir, []

    def make(self, *options, **more):
        if len(calls) == 2:  # the run's own folder and the first one in it
            raise KeyboardInterrupt
        calls.append(self)
        mkdir(self, *options, **more)

    return make
