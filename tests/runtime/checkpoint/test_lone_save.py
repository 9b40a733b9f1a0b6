"""A rank that goes into a save while the other does not: the watchdog ends both, and nothing is committed."""

import os
import subprocess
import sys
import time
from pathlib import Path

from ecar_dist.runtime.checkpoint.files import committed
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.watchdog.watchdog import Watchdog
from tests.conftest import free_port
from tests.runtime.checkpoint.worlds import IDENTITY, State, make_config, save

RANK = """
import sys
from pathlib import Path
from tests.runtime.checkpoint.test_lone_save import one_rank
one_rank(Path(sys.argv[1]))
"""


def one_rank(folder):
    """Over gloo: rank 0 saves step 8, rank 1 believes that it is not due and waits for data."""
    from ecar_dist.runtime.start.rendezvous import start_world

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
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[3]}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(2)]
    try:
        said = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode != 0 for rank in ranks)
    (line,) = [line for line in said.splitlines() if line.startswith("ecar-dist: ")]
    assert 'while the others wait in "checkpoint"' in line
    assert line.startswith("ecar-dist: rank 1 ")
    assert [path.name for path in committed(tmp_path / "tiny/checkpoints")] == ["step-00000004"]
