"""`ecar-dist status` on made-up run directories, on junk, and on a live run."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from ecar_dist.cli import main
from ecar_dist.cluster.run_record import TAIL_BYTES, read_run_record
from ecar_dist.cluster.status import run_status, status_block, status_table
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.lineage import LineageFile
from tests.cluster.made_records import MadeRecord
from tests.conftest import write_yaml
from tests.fork_server import Forked, run_forked


@pytest.fixture
def made(tmp_path):
    return MadeRecord(tmp_path)


def text(status):
    return "\n".join(status_block(status))


def test_of_a_run_that_was_only_submitted(made):
    shutil.move(made.path / "config.yaml", made.path / "kept.yaml")
    made.submitted(12, age=300)
    shutil.copy(made.path / "kept.yaml", made.path / "jobs/001/config.yaml")
    status = made.status()
    assert (status.state, status.job) == ("submitted", "12")
    assert "job 12, 5m00s ago" in status.sentence
    assert (status.progress.last_step, status.progress.total_samples) == (1000, 16_000)
    assert status.checkpoints.step is None
    assert "none yet" in text(status)


def test_a_run_under_way(made):
    made.attempt(5000, 4000, "signal", job="12")
    made.attempt(3000, job="12", resumed_from_step=40)
    made.lines(30, age=12)
    made.checkpoint(200, 400)
    made.checkpoint(280, 60)
    made.job_logs(12, "", 2990)
    status = made.status()
    assert (status.state, status.sentence) == ("running", "job 12 on gpu03, attempt 2, last line 12s ago")
    assert (status.progress.step, status.progress.last_step, status.progress.samples_seen) == (300, 1000, 4800)
    assert status.progress.samples_per_second == pytest.approx(32)
    assert status.progress.seconds_left == pytest.approx((16_000 - 4800) / 32)
    assert (status.progress.data_wait, status.progress.loss) == (pytest.approx(0.01), 1.0)
    found = status.checkpoints
    assert (found.step, found.kept, found.contacted) == (280, 2, True)
    assert found.age == pytest.approx(60)
    assert status.log == str(made.path / "logs/job-12/rank-00000.log")
    for part in ("step 300/1,000", "4,800 of 16,000 samples (30.0%)", "32 samples/s", "5m50s left", "loss 1.0000"):
        assert part in text(status)
    for part in ("step 280, 1m00s ago", "20 steps since", f"2 kept in {made.path}/checkpoints"):
        assert part in text(status)


def test_a_slow_rate_and_a_loss_that_is_not_finite(made):
    made.attempt(900)
    made.lines(30, **{"perf/samples_per_second": 0.4, "train/loss": None})
    status = made.status()
    assert status.progress.loss is None
    for part in ("0.4 samples/s", "7h46m left", "not finite"):
        assert part in text(status)


def test_the_newest_problem_is_told(made):
    def problem():
        found = made.status().problem
        return found and (round(found.age), found.text)

    made.attempt(90_000)
    made.lines(9)
    assert problem() is None
    made.write("logs/substituted.rank-00001.jsonl", '{"sample_id": 7, "reason": "a.tar is cut"}\n', 80_000)
    assert problem() == (80_000, "sample 7 was replaced: a.tar is cut")
    made.write("bad_steps.jsonl", '{"step": 12, "reason": "the loss is nan"}\n{"step": 1', 70_000)
    assert problem() == (70_000, "step 12 was skipped: the loss is nan")
    made.write("bad_steps.jsonl", '{"step": 12, "pass_over": [9, 12]}\n', 60_000)
    assert problem() == (60_000, "step 12: rolled back; steps 9 to 12 are skipped")
    made.write("logs/job-12/bad-nodes", "n2\nn7\n", 50_000)
    assert problem() == (50_000, "the preflight found unfit nodes: n2, n7 (job-12)")
    made.write("logs/job-13/bad-nodes", "", 45_000)  # found nothing
    assert problem() == (50_000, "the preflight found unfit nodes: n2, n7 (job-12)")
    made.write("logs/watchdog/0a/verdict.txt", "rank 1 is gone since step 4\n", 40_000)
    made.write("logs/watchdog/0b/verdict.txt", "rank 3 has been stopped\n", 30_000)
    assert problem() == (30_000, "rank 3 has been stopped")
    made.attempt(20_001, 20_000, "failed: the loss is nan")
    made.write("bad_steps.jsonl", '{"step": 99, "reason": "the loss is nan"}\n', 20_000 - 0.5)
    assert problem() == (19_999, "failed: the loss is nan")  # a time that is rounded down is not before its cause
    assert "problem     5h33m ago: failed: the loss is nan" in text(made.status())


def test_saves_that_failed_are_counted_with_the_checkpoints(made):
    made.attempt(900)
    made.checkpoint(10, 800)
    made.lines(9, **{"checkpoint/failures": [0.0] * 5 + [1.0] * 2 + [2.0] * 2})
    assert made.status().checkpoints.failed_saves == 2
    assert "2 saves failed" in text(made.status())


def test_checkpoints_elsewhere(tmp_path):
    made = MadeRecord(tmp_path, checkpoint={"dir": "s3://key:hunter2@bucket/runs"})
    made.attempt(90, newest_step=400, checkpoints="s3://bucket/runs/tiny")
    found = made.status().checkpoints
    assert (found.step, found.storage, found.contacted) == (400, "s3://bucket/runs/tiny", False)
    assert "step 400" in text(made.status())
    made.attempt(90, checkpoints="")
    found = made.status().checkpoints
    assert (found.step, found.storage) == (None, "s3://bucket/runs/tiny")
    assert "hunter2" not in text(made.status()) + json.dumps(dataclasses.asdict(made.status()))
    there = MadeRecord(tmp_path / "b", checkpoint={"dir": "saved"})  # relative to where the job was started
    there.attempt(90, checkpoints=str(tmp_path / "saved/tiny"))
    for name in ("step-00000030/COMMITTED", "step-00000040/state", "step-junk/COMMITTED", "step-/COMMITTED"):
        (tmp_path / "saved/tiny" / name).parent.mkdir(parents=True)
        (tmp_path / "saved/tiny" / name).touch()
    assert (there.status().checkpoints.step, there.status().checkpoints.kept) == (30, 1)


def test_a_run_directory_that_was_moved(made, tmp_path):
    made.attempt(900, 100, "done", checkpoints=str(made.path / "checkpoints"))
    made.checkpoint(40, 100)
    made.path = made.path.rename(tmp_path / "elsewhere")
    assert made.status().checkpoints.storage == str(tmp_path / "elsewhere/checkpoints")
    assert made.status().checkpoints.step == 40


def test_of_a_long_file_the_end_is_read(made):
    made.attempt(9)
    made.lines(3000)
    assert (made.path / "metrics.jsonl").stat().st_size > 2 * TAIL_BYTES
    with open(made.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99999, "samples_se')
    record = read_run_record(made.path)
    assert (record.lines[0].step > 10_000, record.lines[-1].step) == (True, 30_000)


DEEP, LONG, HUGE = "[" * 100_000, "x" * (TAIL_BYTES + 9), f"[{'9' * 9999}]"
WRONG = json.dumps([{"started": 7, "ended": [], "reason": {}, "host": None, "job": 1, "newest_step": "x"}, 3, None])
LINE = json.dumps({"step": "3", "samples_seen": None, "train/loss": {}, "perf/step_seconds": True})
SLOW = '{"step": 1, "samples_seen": 1, "perf/samples_per_second": 1e-310}'
LARGE = "".join(SLOW.replace("1,", f"{step},", 1).replace("1e-310", "1e308") + "\n" for step in range(9))
EVIL = json.dumps({"step": 1e400, "samples_seen": 10**400, "reason": "\x1b[2J\n\nfake", "pass_over": ["\x1b", {}]})
FILES = ("lineage.json", "metrics.jsonl", "config.yaml", ".lock", "bad_steps.jsonl", "jobs/001/job")
FILES += ("logs/job-12/exit-status", "logs/job-12/bad-nodes", "logs/watchdog/a/verdict.txt")


JUNK = ("", "\0\xff", "{", "[]", "null", DEEP, LONG, HUGE, WRONG, LINE, SLOW, LARGE, EVIL, "\x1b[31m 12")


@pytest.mark.parametrize("name", FILES)
def test_junk_in_a_file_ends_in_no_traceback(tmp_path, name):
    made = MadeRecord(tmp_path)
    for junk in JUNK:
        made.attempt(900, job="12")
        made.lines(9)
        made.submitted(12, 1000)
        made.job_logs(12, "", 890)
        made.write(name, junk, 5)
        status = made.status()
        for line in [*status_block(status), *status_table([status, status])]:
            assert line.isprintable(), junk[:20]
            assert len(line) < 700, junk[:20]
        json.dumps(dataclasses.asdict(status), allow_nan=False)


def test_what_could_not_be_read_is_said(tmp_path):
    unreadable = (
        ("lineage.json", "{", "not JSON"),
        ("metrics.jsonl", LONG, "no line of a step"),
        ("config.yaml", "run: [", "config.yaml"),
        ("config.yaml", "run: {nme: x}", "run.name"),
        ("jobs/001/job", "n2; rm", "no job id"),
    )
    for place, (name, junk, said) in enumerate(unreadable):
        made = MadeRecord(tmp_path / str(place))
        made.attempt(900)
        made.write(name, junk, 5)
        (line,) = [line for line in status_block(made.status()) if line.startswith("  not read")]
        assert f"{name}: " in line
        assert said in line


def test_attempts_of_a_damaged_file_are_those_of_its_copy(made):
    entry = {"attempt": "a", "started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-02T00:00:00+00:00"}
    LineageFile(made.path / "lineage.json").write([{**entry, "reason": "failed: the disk is full"}])
    made.write("lineage.json", '[{"attempt": "a", "host": 7}]', 5)
    status = made.status()
    assert (status.state, status.problem.text) == ("failed", "failed: the disk is full")
    assert [line.partition(": ")[0] for line in status.unread] == [str(made.path / "lineage.json")]


def test_a_line_of_junk_hides_no_other(made):
    made.attempt(900)
    made.lines(9)
    with open(made.path / "metrics.jsonl", "a") as file:
        file.write(f'{DEEP}\n{HUGE}\n3\n{{"step": null}}\n\0\n{{"step": 5')
    status = made.status()
    assert (status.progress.step, status.unread) == (90, ())


def test_a_pipe_a_folder_and_a_loop_are_not_read(made):
    os.mkfifo(made.path / "lineage.json")
    (made.path / "metrics.jsonl").mkdir()
    (made.path / ".lock").symlink_to(".lock")
    status = made.status()
    assert len(status.unread) == 3
    assert "lineage.json: " in text(status)


def test_a_name_that_a_terminal_would_obey(made):
    made.attempt(900)
    made.write("metrics.jsonl", "junk", 5)
    made.path = made.path.rename(made.path.with_name("\x1b[2Jtiny"))
    assert len(made.status().unread) == 1
    assert all(line.isprintable() for line in [*status_block(made.status()), *status_table([made.status()])])


def test_what_is_no_run(tmp_path, capsys):
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        run_status(tmp_path)
    assert main(["status", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_several_runs_make_a_table(made, tmp_path, capsys):
    made.attempt(900, job="12")
    made.lines(30)
    other = MadeRecord(tmp_path / "b")
    other.attempt(900, 100, "failed: the disk is full")
    assert main(["status", str(made.path), str(other.path)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "state", "step", "%"]
    assert first.split()[1:5] == ["running", "300", "30.0", "32"]
    assert "failed" in second
    assert second.endswith(" ago: failed: the disk is full")
    (none := tmp_path / "none").mkdir()
    assert main(["status", str(made.path), str(none)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{none} ")


def test_a_folder_of_runs_is_a_line_for_each(made, tmp_path, capsys):
    made.attempt(900, job="12")
    other = MadeRecord(tmp_path / "other")
    other.attempt(900, 100, "failed: the disk is full")
    (tmp_path / "all/notes").mkdir(parents=True)
    made.path.rename(tmp_path / "all/a")
    other.path.rename(tmp_path / "all/b")
    assert main(["status", str(tmp_path / "all")]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in (first, second)] == ["a", "b"]
    assert "starting" in first
    assert "failed" in second
    assert main(["status", str(tmp_path / "all/notes")]) == 1


def test_as_json_each_run_is_a_line(made, tmp_path, capsys):
    made.attempt(900, job="12")
    made.lines(30)
    assert main(["status", "--json", str(made.path), str(tmp_path / "none")]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["state"], first["progress"]["step"]) == ("running", 300)
    assert list(second) == ["error"]


def test_watching_looks_again_until_it_is_interrupted(made, monkeypatch, capsys):
    made.attempt(900, 100, "signal")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        made.attempt(50, 10, "done")
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["status", "--watch", "7", str(made.path)]) == 0
    out = capsys.readouterr().out
    assert slept == [7, 7]
    assert out.index("state       stopped") < out.index("state       done")


def test_it_imports_no_torch(made):
    made.attempt(900)
    made.lines(3)
    made.checkpoint(10, 5)
    script = (
        f"import sys; from ecar_dist.cli import main; assert main(['status', {str(made.path)!r}]) == 0\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoint  step 10, " in done.stdout


def test_a_run_under_way_is_seen_and_not_disturbed(tree, tmp_path):
    tree["train"], run = {"total_samples": 16 * 40}, tmp_path / "runs/tiny"
    config, states = write_yaml(tree, tmp_path), []
    first = Forked(("train", str(config)), {"ECAR_FAILPOINT": "train.step:delay=0.2"})
    try:
        until = time.monotonic() + 240
        while "running" not in states and time.monotonic() < until and first.process.is_alive():
            if (run / "lineage.json").exists():
                states.append(run_status(run).state)
            time.sleep(0.05)
        assert set(states) == {"starting", "running"}
        status = run_status(run)
        assert f"{socket.gethostname()}, attempt 1" in status.sentence
    finally:
        first.end()
    assert run_status(run).state == "killed"
    done = run_forked("train", str(config), "train.total_samples=96")
    assert done.returncode == 0, done.stderr
    status = run_status(run)
    assert (status.state, status.progress.step) == ("done", 6)
    assert (status.checkpoints.step, status.checkpoints.kept) == (6, 3)
