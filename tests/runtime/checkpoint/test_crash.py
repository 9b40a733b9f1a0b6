"""Real kills at every point of a save, and all kinds of damage: a reader finds an old or new complete checkpoint."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from ecar_dist.runtime.checkpoint.files import committed, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from tests.conftest import free_port
from tests.fork_server import CONTEXT, run_ranks
from tests.runtime.checkpoint.worlds import IDENTITY, State, checkpoints, load, make_config, newest, save

# where a save of step 8 is killed, and the step that a reader finds afterwards
KILLS = {
    "checkpoint.snapshot:nth=3": 4,
    "checkpoint.write:step=8": 4,
    "checkpoint.written:step=8": 4,
    "checkpoint.manifest:nth=3": 4,
    "checkpoint.rename:nth=3": 4,
    "checkpoint.renamed:nth=3": 8,
    "checkpoint.prune": 2,  # while removing what an earlier attempt left behind, after the first commit
    "checkpoint.prune:nth=2": 8,
}


def save_until_killed(folder, failpoint):
    """Save steps 2, 4 and 8 in one process. Runs in a separate process."""
    os.environ["ECAR_FAILPOINT"] = f"{failpoint}:kill"
    (folder / "tiny/checkpoints/tmp-step-00000001-dead").mkdir(parents=True)
    for step in (2, 4, 8):
        save(make_config(folder, keep=2), seed=step, step=step)


def numbers_of(config):
    (restored, state, _) = load(config)[0]
    return restored.progress.step, state.partitions[0]


@pytest.mark.parametrize(("failpoint", "step"), KILLS.items())
def test_a_kill_at_any_point_leaves_the_old_or_the_new_one(tmp_path, failpoint, step):
    child = CONTEXT.Process(target=save_until_killed, args=(tmp_path, failpoint))
    child.start()
    child.join(60)
    folder = tmp_path / "tiny/checkpoints"
    assert child.exitcode == (-signal.SIGKILL)
    found, values = numbers_of(make_config(tmp_path))
    assert found == step
    assert torch.equal(values, State(0, 1, seed=step).partitions[0])
    for path in committed(folder):
        verify(path)
    save(make_config(tmp_path, keep=2), seed=9, step=12, restore=True)  # the next save cleans up
    assert checkpoints(tmp_path) == [f"step-{step:08d}", "step-00000012"]


def test_a_kill_while_a_step_is_saved_again_leaves_a_complete_one(tmp_path):
    """Steps 4 and 8; 8 is damaged, so it is saved again, and killed before the rename."""
    for step in (4, 8):
        save(make_config(tmp_path), seed=step, step=step)
    os.truncate(next((tmp_path / "tiny/checkpoints/step-00000008").glob("*.safetensors")), 100)
    child = CONTEXT.Process(target=save_again_and_be_killed, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert numbers_of(make_config(tmp_path))[0] == 4


def save_again_and_be_killed(folder):
    os.environ["ECAR_FAILPOINT"] = "checkpoint.rename:kill"
    save(make_config(folder), seed=9, step=8)


def test_a_kill_while_loading_changes_nothing(tmp_path):
    save(make_config(tmp_path), seed=4)
    before = {path: path.read_bytes() for path in (tmp_path / "tiny").rglob("*") if path.is_file()}
    child = CONTEXT.Process(target=load_and_be_killed, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in (tmp_path / "tiny").rglob("*") if path.is_file()} == before


def load_and_be_killed(folder):
    os.environ["ECAR_FAILPOINT"] = "load.read:kill"
    load(make_config(folder))


def flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size))


def extend(path, chance):
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 9)))


def zero(path, chance):
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    while not any(content[start : start + 16]):
        start = chance.randrange(len(content))
    content[start : start + 16] = bytes(len(content[start : start + 16]))
    path.write_bytes(content)


def swap(path, chance):
    other = chance.choice([one for one in path.parent.iterdir() if one != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def stale(path, _):
    shutil.copy(path.parent.with_name("step-00000004") / path.name, path)


def remove(path, _):
    path.unlink()


MUTATIONS = [flip, flip, flip, cut, extend, zero, swap, stale, remove]


def test_two_hundred_random_faults_are_all_found(tmp_path, capsys):
    config, folder, chance = make_config(tmp_path), tmp_path / "tiny/checkpoints", random.Random(1)
    for step in (4, 8):
        save(config, 3, seed=step, step=step)
    shutil.copytree(folder / "step-00000008", tmp_path / "good")
    for number in range(200):
        mutate, name = chance.choice(MUTATIONS), chance.choice(sorted(os.listdir(tmp_path / "good")))
        mutate(folder / "step-00000008" / name, chance)
        assert newest(folder).name == "step-00000004", (number, mutate.__name__, name)
        shutil.rmtree(folder / "step-00000008")
        shutil.copytree(tmp_path / "good", folder / "step-00000008")
    assert newest(folder).name == "step-00000008"
    capsys.readouterr()


def one_rank():
    """Two real ranks over gloo: a good save, one that fails on rank 1, a good one, one that rank 1 does not survive."""
    from ecar_dist.runtime.start.rendezvous import start_world

    world, config = start_world(), make_config(Path(sys.argv[1]))
    state = State(world.rank, world.size, seed=1)
    ema = ShardedEma(state.partitions, config.ema)
    store = CheckpointStore(config, world, IDENTITY)
    assert store.restore(state, ema) is None
    for step, failing in (
        (4, ""),
        (8, "checkpoint.write:rank=1:enospc"),
        (12, ""),
        (16, "checkpoint.written:rank=1:kill"),
    ):
        os.environ["ECAR_FAILPOINT"] = failing
        store.begin(Progress(step * 16, step), state, ema, {})
        while store.in_flight:
            if sum(world.gather(store.ready)) == world.size:
                store.settle()
        print(json.dumps([world.rank, step, store.failures, store.last_committed]), flush=True)


def test_real_ranks_agree_on_a_failed_save(tmp_path):
    ranks = run_ranks(2, free_port(), str(tmp_path), main=one_rank, timeout=60)
    out, error = zip(*((rank.stdout, rank.stderr) for rank in ranks), strict=True)
    assert ranks[1].returncode == -signal.SIGKILL, error
    assert ranks[0].returncode not in (0, None)  # it does not wait forever
    for rank in range(2):
        assert [json.loads(line) for line in out[rank].splitlines()] == [
            [rank, 4, 0, 4],
            [rank, 8, 1, 4],
            [rank, 12, 1, 12],
        ]
    (line,) = [line for line in error[0].splitlines() if line.startswith("warning: the checkpoint")]
    assert "of step 8 was not saved: rank 1: cannot write checkpoint.write: No space left on device (it needs" in line
    assert [path.name for path in committed(tmp_path / "tiny/checkpoints")] == ["step-00000012", "step-00000004"]
    assert len(list((tmp_path / "tiny/checkpoints").glob("tmp-step-00000016-*"))) == 1
