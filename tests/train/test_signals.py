"""SIGTERM and SIGUSR1 wherever they find a rank: the job ends soon, with one whole checkpoint and status 75.

The bound is one step, the save on its way and one save; here each of them takes far less than a second, and leaving the
process group and the launcher's own end take the rest. A launcher under Slurm gives 30 s by default.
"""

import contextlib
import json
import os
import sys
import time
from signal import SIGTERM, SIGUSR1

from ecar_dist.drills.processes import Job
from ecar_dist.runtime.checkpoint.files import committed, verify
from ecar_dist.runtime.watchdog.monitor import process_state
from tests.conftest import losses, read_metrics, write_yaml
from tests.train.struck_ranks import PATIENCE, REQUEUE, launch, stop_at

BOUND = 15.0  # seconds


class Run:
    """One run directory, and what may be said of it after each launch."""

    def __init__(self, folder, config):
        self.folder, self.config, self.path, self.launches = folder, config, folder / "runs/tiny", 0

    def log(self):
        self.launches += 1
        return self.folder / f"{self.launches}.txt"

    def stop_at(self, failpoint, **how):
        ended = stop_at(self.config, self.log(), failpoint, **how)
        assert ended.seconds < BOUND
        assert not ended.orphans
        return ended

    def steps_saved(self):
        """Of the committed checkpoints, each of which is whole, beside nothing unfinished."""
        found = committed(self.path / "checkpoints")
        for checkpoint in found:
            verify(checkpoint)
        assert {path.name for path in (self.path / "checkpoints").iterdir()} == {path.name for path in found}
        return [int(path.name[5:]) for path in reversed(found)]

    def last_end(self):
        return json.loads((self.path / "lineage.json").read_text())[-1].get("reason")


def test_a_run_that_is_stopped_again_and_again_is_the_undisturbed_one(undisturbed, tmp_path):
    tree, expected = undisturbed
    tree = tree | {"run": tree["run"] | {"dir": str(tmp_path / "runs")}}
    config = write_yaml(tree, tmp_path)
    run = Run(tmp_path, config)

    ended = run.stop_at("data.take:step=1")  # the loop has begun, no step has
    assert ended.rank_statuses == {0: REQUEUE, 1: REQUEUE}
    assert run.steps_saved() == []

    ended = run.stop_at("train.step:step=2", struck=[1], signals=[SIGUSR1, SIGTERM, SIGUSR1])
    assert ended.rank_statuses == {0: REQUEUE, 1: REQUEUE}
    assert run.steps_saved() == [2]  # the step in which it was struck is done, no other is begun
    assert "stopped on a signal at step 2" in ended.text

    ended = run.stop_at("load.read")
    assert set(ended.rank_statuses.values()) == {REQUEUE}
    assert run.steps_saved() == [2]
    assert run.last_end() == "signal"

    ended = run.stop_at("load.read", struck=[1])  # the other cannot be asked: it ends because this one is gone
    assert ended.rank_statuses[1] == REQUEUE
    assert run.steps_saved() == [2]

    ended = run.stop_at("checkpoint.write:step=4", signals=[SIGUSR1])
    assert ended.rank_statuses == {0: REQUEUE, 1: REQUEUE}
    saved = run.steps_saved()
    assert saved[:2] == [2, 4]  # the save that was on its way stands
    assert len(saved) <= 3  # steps that were done meanwhile have one of their own
    assert saved[-1] == read_metrics(config)[-1]["step"]
    assert run.last_end() == "signal"

    ended = run.stop_at("train.step:step=10", signals=[SIGUSR1])  # in the last step: too late to stop anything
    assert (ended.status, ended.rank_statuses) == (0, {})
    assert losses(read_metrics(config)) == expected
    assert [line["step"] for line in read_metrics(config)] == list(range(1, 11))
    assert run.last_end() == "done"


def burst(pid, count=50, seconds=1.5):
    """So many SIGTERM to one process, as long as it is there."""
    for _ in range(count):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGTERM)
        time.sleep(seconds / count)


def test_fifty_signals_to_the_launcher_cost_no_step(undisturbed, tmp_path):
    """torchrun is gone at its third signal; the ranks, which it has asked to end, do so with their last step saved."""
    tree = undisturbed[0] | {"run": undisturbed[0]["run"] | {"dir": str(tmp_path / "runs")}}
    run = Run(tmp_path, write_yaml(tree, tmp_path))
    slow = "train.step:delay=0.2,checkpoint.write:delay=1.5"
    with launch(run.config, run.log(), "checkpoint.every_samples=100000", failpoint=slow) as job:
        job.reach(2)
        burst(job.pid)
        assert process_state(job.pid) in ("", "Z")
        ended = job.end()
    assert not ended.orphans
    assert run.steps_saved() == [read_metrics(run.config)[-1]["step"]]
    assert run.last_end() == "signal"


def test_fifty_signals_to_a_rank_are_one(undisturbed, tmp_path):
    tree = undisturbed[0] | {"run": undisturbed[0]["run"] | {"dir": str(tmp_path / "runs")}}
    run = Run(tmp_path, write_yaml(tree, tmp_path))
    command = [sys.executable, "-m", "ecar_dist", "train", str(run.config), "checkpoint.every_samples=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ECAR_FAILPOINT": "checkpoint.write:delay=1.5"}
    with Job(command, environment, run.log(), PATIENCE) as job:
        job.reach(2)
        burst(job.pid)
        ended = job.end()
    assert ended.status == REQUEUE
    assert run.steps_saved() == [read_metrics(run.config)[-1]["step"]]
    assert run.last_end() == "signal"
