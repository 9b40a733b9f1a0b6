"""One rank starts a save and the other does not: the watchdog ends both, and nothing is committed."""

import sys
import time
from pathlib import Path

from ecar_dist.runtime.checkpoint.files import committed
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.watchdog.watchdog import Watchdog
from tests.conftest import free_port
from tests.fork_server import run_ranks
from tests.runtime.checkpoint.worlds import IDENTITY, State, make_config, save


def one_rank():
    """Over gloo: rank 0 saves step 8, rank 1 believes that no save is due, and waits for data."""
    from ecar_dist.runtime.start.rendezvous import start_world

    folder = Path(sys.argv[1])
    world, config = start_world(), make_config(folder)
    state = State(world.rank, world.size, seed=1)
    with Watchdog(folder / "watchdog", world, 1.0, "first") as dog:
        for step in range(1, 9):
            dog.beat("data", step)
        if world.is_first:
            dog.beat("checkpoint", 8)
            store = CheckpointStore(config, world, IDENTITY)
            store.begin(Progress(8 * 16, 8), state, ShardedEma(state.partitions, config.ema), {})
            store.finish()
        time.sleep(600)


def test_a_rank_that_saves_alone_is_ended_and_commits_nothing(tmp_path):
    save(make_config(tmp_path), 2, step=4)
    ranks = run_ranks(2, free_port(), str(tmp_path), main=one_rank, timeout=60)
    said = "".join(rank.stderr for rank in ranks)
    assert all(rank.returncode != 0 for rank in ranks)
    (line,) = [line for line in said.splitlines() if line.startswith("ecar-dist: ")]
    assert 'while the others wait in "checkpoint"' in line
    assert line.startswith("ecar-dist: rank 1 ")
    assert [path.name for path in committed(tmp_path / "tiny/checkpoints")] == ["step-00000004"]
