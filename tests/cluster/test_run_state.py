"""The state of a run from its files: what happened last, and which process may still be running."""

import os

import pytest

from tests.cluster.made_records import MadeRecord

HANG = 600  # train.hang_seconds by default
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
    assert "job 12, 5m00s ago" in status.sentence
    assert status.sentence.endswith("stopped")
    made.job_logs(12, age=100)
    status = made.status()
    assert (status.state, status.job) == ("starting", "12")
    assert "1m40s" in status.sentence
    made.job_logs(12, "", 90)
    assert made.status().state == "starting"


def test_a_job_has_begun_by_its_number_or_by_what_came_after_it(made):
    made.attempt(900, 100, "done", job="12")
    made.submitted(12, age=1)  # in a copied run directory, all files are new
    assert made.status().state == "done"
    made.submitted(9, age=1000)  # a chain: each link has its own number
    assert made.status().state == "done"
    made.submitted(9, age=50)
    assert made.status().state == "submitted"


def test_an_attempt_says_itself_how_it_ended(tmp_path):
    endings = {
        "done": ("done", ""),
        "signal": ("stopped", "same command again"),
        "failed: a shard is damaged": ("failed", "a shard is damaged"),
        "gave up: step 4 is bad": ("gave up", "step 4 is bad"),
    }
    for place, (ended, (state, why)) in enumerate(endings.items()):
        made = MadeRecord(tmp_path / str(place))
        made.attempt(1000, 100, ended, resumed_from_step=None)
        made.lines(3, age=110)
        status = made.status()
        assert status.state == state
        assert status.sentence.startswith("1m40s ago")
        assert status.sentence.endswith(why)
        problem = status.problem and status.problem.text
        assert problem == (ended if state in ("failed", "gave up") else None)


def test_a_run_on_another_host_is_judged_by_its_silence(made):
    made.attempt(9000, job="12")
    made.job_logs(12, "", 9010)
    made.lock("gpu03", 1)  # a process with this number runs here, on a different host
    for silence, state, said in ((HANG - 20, "running", "9m40s"), (HANG + 20, "silent", "10m20s")):
        made.lines(30, age=silence)
        status = made.status(here="login")
        assert status.state == state
        assert said in status.sentence
    assert "squeue -j 12" in status.sentence
    made.write("logs/job-12/rank-00000.log", "still talking", 5)
    assert made.status(here="login").state == "running"


def test_a_start_may_be_silent_for_as_long_as_the_watchdog_allows(made):
    made.attempt(3 * HANG - 20)
    assert made.status().state == "starting"
    made.attempt(3 * HANG + 20)
    assert made.status().state == "silent"


def test_a_longer_hang_time_makes_a_longer_silence_normal(tmp_path):
    made = MadeRecord(tmp_path, train={"hang_seconds": 5000})
    made.attempt(1e6)
    made.lines(30, age=4900)
    assert made.status().state == "running"
    made.lines(30, age=5100)
    assert made.status().state == "silent"


def test_without_a_watchdog_the_usual_time_counts(tmp_path):
    made = MadeRecord(tmp_path, train={"hang_seconds": 0})
    made.attempt(1e6)
    for silence, state in ((HANG - 20, "running"), (HANG + 20, "silent")):
        made.lines(30, age=silence)
        assert made.status().state == state


def test_on_its_own_host_the_process_is_looked_up(made):
    made.attempt(9000)
    made.lines(30, age=5)
    made.lock("gpu03", GONE)
    assert made.status(here="gpu03").state == "killed"
    assert str(GONE) in made.status(here="gpu03").sentence
    assert made.status(here="login").state == "running"
    made.lock("gpu03", os.getpid(), age=0)
    made.lines(30, age=3 * HANG)
    assert made.status(here="gpu03").state == "silent"  # the process is alive


def test_lines_of_an_earlier_attempt_do_not_make_the_next_one_run(made):
    made.attempt(9000, 5000, "signal")
    made.lines(30, age=40)
    made.attempt(40, newest_step=300, loaded=False)
    assert made.status().state == "starting"
    made.attempt(40, resumed_from_step=300)
    assert made.status().state == "starting"
    made.lines(31, age=1)
    assert made.status().state == "running"


def test_an_exit_status_speaks_where_no_attempt_does(tmp_path):
    for written, state in (("1", "failed"), ("75", "stopped"), ("93", "gave up"), ("130", "killed")):
        made = MadeRecord(tmp_path / written)
        made.submitted(12, age=500)
        made.job_logs(12, written, 100)
        status = made.status()
        assert status.state == state
        for part in ("job 12", "before training", f"status {written}", "1m40s", "logs/job-12/rank-00000.log"):
            assert part in status.sentence
        made.attempt(300, job="12")
        status = made.status()
        assert status.state == state
        assert f"status {written}" in status.sentence
        assert "before training" not in status.sentence


def test_an_exit_status_belongs_to_the_attempt_that_has_just_ended(made):
    made.attempt(1000, 100, "failed: a shard is damaged", job="12")
    made.job_logs(12, "1", 95)
    assert "a shard is damaged" in made.status().sentence
    made.job_logs(12, "93", 95)
    assert (made.status().state, "a shard is damaged" in made.status().sentence) == ("gave up", True)
    made.job_logs(12, "75", 20)  # from a later start, which found a node unfit
    assert "before training" in made.status().sentence
    assert "status 75" in made.status().sentence


def test_a_killed_job_that_slurm_has_requeued_begins_again(made):
    made.attempt(9000, job="12")
    made.lines(30, age=HANG + 50)
    made.job_logs(12, "", 9010)
    assert made.status().state == "silent"
    made.job_logs(12, age=30)  # the script has removed the previous exit status
    status = made.status()
    assert status.state == "starting"
    assert "job 12" in status.sentence
    assert "30s" in status.sentence
    made.job_logs(12, "", 20)  # rank 0 has started
    assert made.status().state == "starting"
    made.attempt(10, job="12", loaded=False)
    status = made.status()
    assert status.state == "starting"
    assert status.sentence == "job 12 on gpu03, attempt 2, for 10s"
    made.job_logs(12, "", 5)  # clocks differ: that of the file system is ahead of the node's
    made.attempt(10, job="12", resumed_from_step=300)
    made.lines(31, age=1)
    assert made.status().state == "running"


def test_a_silent_attempt_waits_for_a_job_that_was_submitted_since(made):
    made.attempt(9000, job="12")
    made.lines(3, age=8000)
    made.submitted(13, age=50)
    status = made.status()
    assert (status.state, status.job) == ("submitted", "13")
    assert status.sentence.endswith("silent")
