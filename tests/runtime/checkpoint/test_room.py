"""A disk that is full for real: the old checkpoint stays, training continues, and the message says what is needed."""

import os
import re

import pytest
import torch

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import committed, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.world import RemoteError
from tests.runtime.checkpoint.worlds import BATCH, Ranks, State, load, make_config, store_of

SHAPES = {"a": (500, 1000)}  # 8 MB for four kinds


@pytest.mark.parametrize("small_disk", ["20m"], indirect=True)  # room for two checkpoints, not three
def test_a_full_disk(small_disk, tmp_path, capsys):
    config = make_config(tmp_path, dir=str(small_disk), keep=3)
    folder = small_disk / "tiny"

    def run(world):
        state = State(world.rank, world.size, 1, shapes=SHAPES)
        ema = ShardedEma(state.partitions, config.ema)
        with store_of(config, world) as store:
            store.restore(state, ema)
            warning = store.space_warning(state)
            for step in (4, 8, 12):
                store.begin(Progress(step * BATCH, step), state, ema, {})
                while store.in_flight:
                    store.settle()
                state.partitions[0].add_(1)  # training continues
            assert (store.failures, store.last_committed) == (1, 8)
            with pytest.raises(CheckpointError if world.is_first else RemoteError):
                store.finish()
            world.barrier()
            if world.is_first:
                os.unlink(next((folder / "step-00000004").glob("*0-of*")))
            store.begin(Progress(16 * BATCH, 16), state, ema, {})
            store.finish()
            return warning

    warning = Ranks(2)(run)[0]
    assert re.search(rf"^warning: {folder} .*20\.0 MiB .*30\.5 MiB .*checkpoint\.keep=3", warning)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write {folder}: No space left on device (it needs 7.6 MiB, and 4.7 MiB are free)" in line
    assert [path.name for path in committed(folder)] == ["step-00000016", "step-00000008"]
    for path in committed(folder):
        verify(path)
    restored, state, _ = load(config, shapes=SHAPES)[0]
    assert restored.progress.step == 16
    assert torch.equal(state.partitions[0], State(0, 1, 1, shapes=SHAPES).partitions[0] + 1 + 1 + 1)


def test_a_warning_below_the_space_of_the_checkpoints_to_come(monkeypatch, tmp_path):
    """Two are kept, and a third one exists while it is being written. Each is 8 MiB here."""

    def run(world):
        state = State(0, 1, 1)
        warnings = []
        with store_of(make_config(tmp_path, keep=2), world) as store:
            assert store.needed_bytes(state) == 37 * 4 * 4
            monkeypatch.setattr(store, "needed_bytes", lambda engine: 2**23)
            for present, free in [(0, 24), (0, 23), (1, 16), (1, 15), (2, 8), (2, 7), (3, 0)]:
                monkeypatch.setattr(store.storage, "committed", lambda present=present: ["step"] * present)
                monkeypatch.setattr(store.storage, "free_bytes", lambda free=free: free * 2**20)
                warnings.append(store.space_warning(state))
        return warnings

    (warnings,) = Ranks(1)(run)
    needed = [warning and re.findall(r"(\S+) MiB", warning) for warning in warnings]
    assert needed == [None, ["23.0", "24.0", "8.0"], None, ["15.0", "16.0", "8.0"], None, ["7.0", "8.0", "8.0"], None]
