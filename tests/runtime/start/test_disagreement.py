"""Ranks that disagree, which the loop never allows: whatever they do, nothing inconsistent is committed."""

import pytest

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import committed, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.peers import RemoteError
from tests.runtime.checkpoint.worlds import Ranks, State, make_config, save, store_of


def test_ranks_that_save_different_steps_commit_neither(tmp_path, capsys):
    config = make_config(tmp_path)
    save(config, 2, step=4)

    def run(world):
        state, step = State(world.rank, world.size, seed=1), 8 + world.rank
        with store_of(config, world) as store:
            store.begin(Progress(16 * step, step), state, ShardedEma(state.partitions, config.ema), {})
            with pytest.raises(CheckpointError if world.is_first else RemoteError):
                store.finish()

    Ranks(2)(run)
    assert "the checkpoint of step 8 was not saved" in capsys.readouterr().err
    (path,) = committed(tmp_path / "tiny/checkpoints")
    assert path.name == "step-00000004"
    verify(path)
