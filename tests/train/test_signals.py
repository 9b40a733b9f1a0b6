"""Bursts of SIGTERM, to the launcher and to a process without one: one step, one checkpoint, status 75."""

import contextlib
import os
import time
from signal import SIGTERM

from ecar_dist.runtime.watchdog.watched import process_state
from tests.conftest import read_metrics
from tests.train.struck_ranks import REQUEUE, Struck, launch


def burst(pid, count=50, seconds=1.5):
    """Send this many SIGTERM to one process, as long as it exists."""
    for _ in range(count):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGTERM)
        time.sleep(seconds / count)


def test_fifty_signals_to_the_launcher_cost_no_step(run, tmp_path):
    """torchrun dies at its third signal. The ranks, which it has asked to end, still save their last step first."""
    slow = "train.step:delay=0.2,checkpoint.write:delay=1.5"
    with launch(run.config, tmp_path / "log.txt", "checkpoint.every_samples=100000", failpoint=slow) as job:
        job.reach(2)
        burst(job.pid)
        until = time.monotonic() + 60
        while process_state(job.pid) not in ("", "Z") and time.monotonic() < until:
            time.sleep(0.01)
        assert process_state(job.pid) in ("", "Z")
        ended = job.end()
    assert not ended.orphans
    assert run.steps_saved() == [read_metrics(run.config)[-1]["step"]]
    assert run.last_end() == "signal"


def test_fifty_signals_to_a_rank_are_one(run):
    slow = "checkpoint.write:delay=1.5"
    with Struck(run.config, "checkpoint.every_samples=100000", ranks=1, failpoint=slow) as job:
        job.reach(2)
        burst(job.pid(0))
        ended = job.end()
    assert ended.statuses == [REQUEUE]
    assert run.steps_saved() == [read_metrics(run.config)[-1]["step"]]
    assert run.last_end() == "signal"
