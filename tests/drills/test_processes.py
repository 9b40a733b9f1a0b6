"""A job that is watched and struck, on small stand-ins for the launcher and its ranks."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from ecar_dist.drills.processes import Ended, Job, UnexpectedError, last_words, marked

# with a child that ends with it, like a watchdog's monitor
RANK = """
import subprocess, sys, time
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
print("up", flush=True)
time.sleep(float(sys.argv[1]))
"""
# two ranks; when they die, the launcher exits with the signal's number
LAUNCHER = f"""
import os, subprocess, sys
print("step 1/9  loss 1", flush=True)
print("step 12/9  loss 1", flush=True)
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}, sys.argv[1]], env={{**os.environ, "RANK": str(r)}},
                          start_new_session=True) for r in range(2)]
status = ranks[1].wait()
if sys.argv[2] == "tidy":
    ranks[0].kill()
sys.exit(-status)
"""


@pytest.fixture
def launch(tmp_path):
    """Start the launcher; what is left of it at the end of the test is killed."""
    jobs = []

    def start(seconds="60", manner="tidy", patience=120.0):
        command = [sys.executable, "-c", LAUNCHER, seconds, manner]
        jobs.append(Job(command, os.environ, tmp_path / f"log-{len(jobs)}.txt", patience))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def wait_for_ranks(job):
    job.wait_for(lambda: job.text.count("up") == 2, "two ranks")
    return job.rank_processes()


def test_a_struck_rank_is_the_one_that_was_meant_and_the_clock_starts_there(launch):
    job, began = launch(), time.monotonic()
    job.reach(10)
    assert sorted(wait_for_ranks(job)) == [0, 1]
    time.sleep(0.3)
    job.strike(signal.SIGTERM, 1)
    ended = job.end()
    assert (ended.status, ended.orphans) == (signal.SIGTERM, ())
    assert ended.seconds < time.monotonic() - began - 0.3
    assert not marked(job._mark)


def test_what_outlives_the_launcher_is_named_and_killed(launch, monkeypatch):
    monkeypatch.setattr("ecar_dist.drills.processes.TIDY_SECONDS", 0.2)
    job = launch(manner="untidy")
    ranks = wait_for_ranks(job)
    job.strike(signal.SIGKILL, 1)
    ended = job.end()
    assert any(orphan.startswith(f"{ranks[0]} ({sys.executable} -c") for orphan in ended.orphans)
    assert not any(orphan.startswith(f"{ranks[1]} ") for orphan in ended.orphans)
    assert not marked(job._mark)


def test_a_job_without_end_is_killed_with_all_it_started(launch):
    job = launch()
    wait_for_ranks(job)
    job._patience = 1.0
    os.kill(job.rank_processes()[0], signal.SIGSTOP)
    assert job.end().status is None
    assert not marked(job._mark)


def test_an_interrupted_drill_leaves_nothing(launch):
    with contextlib.suppress(KeyboardInterrupt), launch() as job:
        assert len(wait_for_ranks(job)) == 2
        raise KeyboardInterrupt
    assert not marked(job._mark)


def test_a_job_that_ends_before_the_fault_says_why(launch):
    job = launch(seconds="0")
    with pytest.raises(UnexpectedError, match="the job ended before step 13: up"):
        job.reach(13)
    with pytest.raises(UnexpectedError, match="rank 1 had ended before the fault"):
        job.strike(signal.SIGKILL, 1)


def test_a_step_that_never_comes_is_not_awaited_for_ever(launch):
    with pytest.raises(UnexpectedError, match=r"no step 13 within 1 s"):
        launch(patience=1.0).reach(13)


def test_a_hobbled_rank_is_stopped_most_of_the_time_and_runs_at_the_end(launch):
    job = launch(seconds="4")
    pid = wait_for_ranks(job)[1]
    seen = subprocess.Popen(
        ["sh", "-c", f"for i in $(seq 40); do cut -d' ' -f3 /proc/{pid}/stat; sleep 0.02; done"],
        stdout=subprocess.PIPE,
        text=True,
    )
    job.hobble(1, stopped=0.06, running=0.02)
    states = seen.communicate()[0].split()
    assert 0.4 < states.count("T") / len(states) < 0.95
    assert job.end().status == 0


def test_the_last_words_are_those_that_help():
    gloo = "[rank0]: RuntimeError: connection closed\n"
    assert last_words(f"{gloo}ecar-dist: disk full\n====\n") == "ecar-dist: disk full"
    assert last_words(f"step 1\n{gloo}Traceback\ntorch.ChildFailedError: \n====\n") == "RuntimeError: connection closed"
    assert last_words("step 1\nstep 2\n\n") == "step 2"
    assert last_words("") == "it printed nothing"


REPORT = """
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : 75 (pid: 4711)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 4710)
"""


def test_the_status_of_each_rank_is_read_from_the_launchers_report():
    assert Ended(1, REPORT, 0.0).rank_statuses == {1: 75, 0: -9}
