"""The state of a run by its files: what came last, and who may still be at it."""

import os

import pytest

from ecar_dist.command_line import duration
from tests.cluster.made_records import MadeRecord

HANG = 600  # train.hang_seconds by default; a silence of three times that is more than the watchdog allows
GONE = 1 << 22  # no process has this number: it is the kernel's largest, plus one


@pytest.fixture
def made(tmp_path):
    return MadeRecord(tmp_path)


def test_a_job_submitted_after_the_last_attempt_waits_and_one_that_has_begun_does_not(made):
    made.attempt(9000, 5000, "signal", job="11")
    made.submitted(11, age=9100)
    made.job_logs(11, "75", 5000)
    assert made.status().state == "stopped"
    made.submitted(12, age=300, folder="002")
    status = made.status()
    assert (status.state, status.job) == ("submitted", "12")
    assert status.sentence.endswith("has not started; before that: stopped")
    made.job_logs(12, age=100)
    status = made.status()
    assert (status.state, status.job) == ("starting", "12")
    assert status.sentence == "job 12, no attempt is on record yet, for 1m40s"
    made.job_logs(12, "", 90)
    assert made.status().state == "starting"


def test_a_job_has_begun_by_its_number_or_by_what_came_after_it(made):
    made.attempt(900, 100, "done", job="12")
    made.submitted(12, age=1)  # of a copied run directory all files are new
    assert made.status().state == "done"
    made.submitted(9, age=1000)  # a chain: each link has a number of its own
    assert made.status().state == "done"
    made.submitted(9, age=50)
    assert made.status().state == "submitted"


@pytest.mark.parametrize(
    ("ended", "state", "words"),
    [
        ("done", "done", "1m40s ago"),
        ("signal", "stopped", "1m40s ago: on a signal; it goes on when the job is requeued"),
        ("failed: a shard is damaged", "failed", "1m40s ago: a shard is damaged"),
        ("gave up: step 4 is bad", "gave up", "1m40s ago: step 4 is bad"),
    ],
)
def test_an_attempt_says_itself_how_it_ended(made, ended, state, words):
    made.attempt(1000, 100, ended, resumed_from_step=None)
    made.lines(3, age=110)
    status = made.status()
    assert status.state == state
    assert status.sentence.startswith(words)
    assert status.attempts == {state: 1}
    assert status.training_seconds == pytest.approx(900)
    failed = state in ("failed", "gave up")
    assert (status.problem is not None and status.problem.text == ended) is failed


@pytest.mark.parametrize(
    ("silence", "state"), [(50, "running"), (70, "silent"), (3 * HANG, "silent"), (3 * HANG + 100, "killed")]
)
def test_a_run_on_another_host_is_judged_by_its_silence(made, silence, state):
    made.attempt(9000, job="12")
    made.job_logs(12, "", 9010)
    made.lock("gpu03", 1)  # a process of that number lives here, on another host
    made.lines(30, age=silence)
    status = made.status(here="login")
    assert status.state == state
    words = {
        "silent": f"silent for {duration(silence)}",
        "killed": f"silent for {duration(silence)}, longer than its watchdog",
    }
    assert words.get(state, "last line 50s ago") in status.sentence
    made.write("logs/job-12/rank-00000.log", "still talking", 5)
    assert made.status(here="login").state == "running"


def test_a_slow_run_may_be_silent_for_longer(made):
    made.attempt(9000)
    made.lines(30, age=250, **{"perf/step_seconds": 6.0})  # a line a minute
    assert made.status().state == "running"
    made.lines(30, age=310, **{"perf/step_seconds": 6.0})
    assert made.status().state == "silent"


def test_without_a_watchdog_silence_alone_is_no_end(tmp_path):
    made = MadeRecord(tmp_path, train={"hang_seconds": 0})
    made.attempt(1e6)
    made.lines(30, age=9e5)
    assert made.status().state == "silent"


def test_on_its_own_host_the_process_is_looked_up(made):
    made.attempt(9000)
    made.lines(30, age=5)
    made.lock("gpu03", GONE)
    assert made.status(here="gpu03").state == "killed"
    assert "its process is gone" in made.status(here="gpu03").sentence
    assert made.status(here="login").state == "running"
    made.lock("gpu03", os.getpid(), age=0)
    made.lines(30, age=3 * HANG + 100)
    assert made.status(here="gpu03").state == "silent"  # it lives
    made.lock("gpu03", os.getpid(), age=1e6)  # held long before this process began: its number was given out again
    assert made.status(here="gpu03").state == "killed"


def test_lines_of_an_earlier_attempt_do_not_make_the_next_one_run(made):
    made.attempt(9000, 5000, "signal")
    made.lines(30, age=40)
    made.attempt(40, newest_step=300, loaded=False)
    assert made.status().state == "starting"
    made.attempt(40, resumed_from_step=300)
    assert made.status().state == "starting"
    made.lines(31, age=1)
    assert made.status().state == "running"


@pytest.mark.parametrize(
    ("written", "state"), [("1", "failed"), ("75", "stopped"), ("93", "gave up"), ("130", "killed")]
)
def test_an_exit_status_speaks_where_no_attempt_does(made, written, state):
    made.submitted(12, age=500)
    made.job_logs(12, written, 100)
    status = made.status()
    assert status.state == state
    assert f"job 12 ended before training began with status {written}, 1m40s ago" in status.sentence
    made.attempt(300, job="12")
    assert made.status().state == state
    assert f"job 12 ended with status {written}" in made.status().sentence
    assert made.status().attempts == {state: 1}


def test_an_exit_status_belongs_to_the_attempt_that_has_just_ended(made):
    made.attempt(1000, 100, "failed: a shard is damaged", job="12")
    made.job_logs(12, "1", 95)
    assert "a shard is damaged" in made.status().sentence
    made.job_logs(12, "93", 95)
    assert (made.status().state, "a shard is damaged" in made.status().sentence) == ("gave up", True)
    made.job_logs(12, "75", 20)  # of a later start, which found a node unfit
    assert "ended before training began with status 75" in made.status().sentence


def test_a_killed_job_that_slurm_has_requeued_begins_again(made):
    made.attempt(9000, job="12")
    made.lines(30, age=500)
    made.job_logs(12, "", 9010)
    assert made.status().state == "silent"
    made.job_logs(12, age=30)  # the script has removed the exit status of before
    status = made.status()
    assert (status.state, status.attempts) == ("starting", {"killed": 1})
    assert status.sentence == "job 12, no attempt is on record yet, for 30s"
    assert status.training_seconds == pytest.approx(8500)
    made.job_logs(12, "", 20)  # rank 0 has begun
    assert made.status().state == "starting"
    made.attempt(10, job="12", loaded=False)
    status = made.status()
    assert (status.state, status.attempts) == ("starting", {"killed": 1, "starting": 1})
    assert status.sentence == "job 12 on gpu03, attempt 2, for 10s"
    made.job_logs(12, "", 5)  # clocks differ: that of the file system is ahead of the node's
    made.attempt(10, job="12", resumed_from_step=300)
    made.lines(31, age=1)
    assert made.status().state == "running"


def test_a_killed_attempt_waits_for_a_job_that_was_submitted_since(made):
    made.attempt(9000, job="12")
    made.lines(3, age=8000)
    made.submitted(13, age=50)
    assert (made.status().state, made.status().attempts) == ("submitted", {"killed": 1})
