import errno
import os
import resource
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ecar_dist.errors import ConfigError, FruitlessError, NodeError
from ecar_dist.runtime.run import directory as directory_module
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.atomic import atomic_write
from tests.train.test_objective import make_config

OWNER = """
import sys, time
from ecar_dist.runtime.run.directory import RunDirectory
directory = RunDirectory(sys.argv[1])
directory.open_for_training()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path):
    run = tmp_path / "run"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"process {owner.pid} on \S+ .*{run}"):
        RunDirectory(run).open_for_training()
    owner.kill()
    owner.wait()
    held = RunDirectory(run)
    held.open_for_training()
    assert str(os.getpid()) in (run / ".lock").read_text()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):  # another open file of the same process
        RunDirectory(run).open_for_training()


OF_A_JOB = {"SLURM_JOB_ID": "77"}, {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "76"}


@pytest.mark.parametrize("job", OF_A_JOB, ids=["requeued", "link of a chain"])
def test_an_earlier_attempt_of_the_same_job_is_waited_for(tmp_path, monkeypatch, capsys, job):
    run = tmp_path / "run"
    command = [sys.executable, "-c", OWNER, run]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **job})
    assert owner.stdout.readline() == "held\n"
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    if "SLURM_ARRAY_JOB_ID" in job:
        monkeypatch.setenv("SLURM_JOB_ID", "79")
    pause = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: (owner.kill(), owner.wait()))
    monkeypatch.setattr(directory_module, "time", pause)  # it is killed while it is waited for
    RunDirectory(run).open_for_training()
    number = job.get("SLURM_ARRAY_JOB_ID", "77")
    said = f"Slurm job {number}, an earlier attempt, still holds {run}; waiting 120 s at most"
    assert capsys.readouterr().out.count(said) == 1
    assert f"process {os.getpid()} on {socket.gethostname()}, Slurm job {number}\n" == (run / ".lock").read_text()


def test_the_wait_for_an_earlier_attempt_has_a_limit_and_another_job_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ecar_dist.runtime.run.directory.LOCK_SECONDS", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    owner = RunDirectory(tmp_path / "run")
    owner.open_for_training()
    with pytest.raises(NodeError, match=f"Slurm job 77, .*{tmp_path}"):  # status 75
        RunDirectory(tmp_path / "run").open_for_training()
    assert "waiting 1 s at most" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match=r"Slurm job 77 "):
        RunDirectory(tmp_path / "run").open_for_training()
    assert capsys.readouterr().out == ""


def test_what_a_job_script_writes_before_the_start_is_not_another_run(tmp_path):
    (tmp_path / "jobs/001").mkdir(parents=True)
    (tmp_path / "logs/job-77").mkdir(parents=True)
    RunDirectory(tmp_path).open_for_training()
    assert (tmp_path / "lineage.json").exists()
    for name in ("lineage.json", ".lineage.json.copy"):
        (tmp_path / name).unlink()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=rf"{tmp_path} .*lineage\.json"):
        RunDirectory(tmp_path).open_for_training()


def test_reading_a_run_does_not_import_torch():
    modules = "ecar_dist.runtime.run.directory, ecar_dist.runtime.checkpoint.files"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_an_interrupted_start_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on gone\n")
    RunDirectory(tmp_path).open_for_training()
    assert (tmp_path / "lineage.json").exists()


def start(path, step=None):
    """One more attempt, whose owner has ended without recording it."""
    directory = RunDirectory(path)
    directory.open_for_training()
    directory._lock.close()
    directory.begin_attempt(newest_step=step)
    return directory


@pytest.mark.parametrize("chain", [False, True], ids=["requeued", "links of a chain"])
def test_a_job_that_never_gets_further_is_refused(tmp_path, monkeypatch, chain):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    if chain:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    for link in range(3):
        monkeypatch.setenv("SLURM_JOB_ID", str(77 + 10 * link * chain))
        start(tmp_path / "run", step=40)
    with pytest.raises(FruitlessError, match=r"job 77 .* 3 .* step 40"):
        start(tmp_path / "run", step=40)
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # submitted again by hand
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    start(tmp_path / "run", step=40)


@pytest.mark.parametrize("difference", ["progress", "signal", "no job"])
def test_a_job_that_gets_further_or_was_preempted_or_is_started_by_hand_continues(tmp_path, monkeypatch, difference):
    if difference == "no job":
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    else:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    for attempt in range(5):
        directory = start(tmp_path / "run", step=40 + (attempt if difference == "progress" else 0))
        directory.end_attempt("signal" if difference == "signal" else "failed: a shard is damaged")
    assert len(directory.attempts()) == 5
    assert all(one["ended"] >= one["started"] for one in directory.attempts())


def test_an_attempt_knows_when_a_later_one_has_taken_over(tmp_path):
    first = start(tmp_path / "run")
    assert first.is_ours()
    second = start(tmp_path / "run")
    assert (first.is_ours(), second.is_ours()) == (False, True)


DAMAGE = {
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes().replace(b'"attempt"', b'"\x61ttempu"', 1)[:-3]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "another type": lambda path: path.write_text("{}"),
    "a number for a name": lambda path: path.write_text('[{"attempt": 7}]'),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a first entry without a name": lambda path: path.write_text("[{}]"),
    "a start that is no time": lambda path: path.write_text('[{"attempt": "ab", "started": "2024-13-45"}]'),
    "huge": lambda path: os.truncate(path, 40 << 30),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


def test_a_damaged_lineage_is_set_aside_and_replaced_by_its_copy(tmp_path, capsys):
    for number, (case, damage) in enumerate(DAMAGE.items()):
        run = tmp_path / str(number)
        first = start(run, step=3)
        before = first.attempts()
        capsys.readouterr()
        damage(first.lineage)
        assert first.attempts() == before, case
        second = start(run, step=4)
        assert second.attempts()[:-1] == before, case
        assert (second.run_id, second.record_lost) == (before[0]["attempt"], False), case
        assert os.path.lexists(run / "lineage.json.damaged-1"), case
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{run}/lineage.json is damaged" in said
        for path in (second.lineage, second._record.copy):
            damage(path)
        third = start(run, step=4)
        assert (len(third.attempts()), third.record_lost) == (1, True), case
        kept = sorted(path.name for path in run.glob("*.damaged-*"))
        assert kept == [".lineage.json.copy.damaged-1", "lineage.json.damaged-1", "lineage.json.damaged-2"], case


def test_a_flipped_bit_that_is_still_json_is_found(tmp_path):
    first = start(tmp_path, step=3)
    start(tmp_path, step=3)
    name, text = first.run_id, first.lineage.read_text()
    for old, new in (
        (f'"{name}"', '"00000000"'),
        ('"newest_step": 3', '"newest_step": 7'),
        ("newest_step", "oewest_step"),
    ):
        first.lineage.write_text(text.replace(old, new, 1))
        again = start(tmp_path, step=3)
        assert again.run_id == name
        assert {one["newest_step"] for one in again.attempts()} == {3}
        text = first.lineage.read_text()
    assert len(list(tmp_path.glob("lineage.json.damaged-*"))) == 3


def test_a_copy_that_is_behind_or_damaged_changes_nothing(tmp_path, capsys):
    first = start(tmp_path)
    behind = first._record.copy.read_text()
    first.note_attempt(precision="fp32")
    for text in (behind, behind.replace("sha", "shb"), behind[:50], ""):
        first._record.copy.write_text(text)
        again = start(tmp_path)
        assert again.attempts()[0]["precision"] == "fp32"
        assert again.run_id == first.run_id
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", [("lineage.json", ".lineage.json.copy"), ("metrics.jsonl", ".lineage.json.copy")])
def test_a_lineage_that_is_gone_comes_from_its_copy(tmp_path, capsys, left):
    first = start(tmp_path, step=3)
    (tmp_path / "metrics.jsonl").touch()
    for path in tmp_path.iterdir():
        if path.is_file() and path.name not in left:
            path.unlink()
    (tmp_path / "lineage.json").unlink(missing_ok=True)
    again = start(tmp_path, step=3)
    assert (again.run_id, len(again.attempts()), again.record_lost) == (first.run_id, 2, False)
    assert f"{tmp_path}/lineage.json is gone" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_lineage_that_is_gone_and_a_damaged_copy_are_a_lost_record(tmp_path):
    first = start(tmp_path)
    first.lineage.unlink()
    first._record.copy.write_text("{")
    again = RunDirectory(tmp_path)
    again.open_for_training()
    assert again.record_lost


def test_a_folder_with_the_name_of_the_copy_does_not_stop_a_start(tmp_path):
    first = start(tmp_path)
    first._record.copy.unlink()
    first._record.copy.mkdir()
    again = start(tmp_path)
    assert (again.run_id, len(again.attempts())) == (first.run_id, 2)
    assert again._record.known() == again.attempts()


def test_damage_while_it_runs_neither_ends_an_attempt_nor_hides_a_later_one(tmp_path):
    in_place = ("a flipped bit", "not UTF-8", "cut", "empty", "huge")
    for number, case in enumerate(in_place):
        run = tmp_path / str(number)
        first = start(run)
        DAMAGE[case](first.lineage)
        assert first.is_ours(), case
        first.note_attempt(precision="fp32")
        assert first.attempts()[-1]["precision"] == "fp32", case
        assert (run / "lineage.json.damaged-1").exists(), case
        second = start(run)
        DAMAGE[case](second.lineage)
        assert (first.is_ours(), second.is_ours()) == (False, True), case
        first.note_attempt(reason="mine")
        second.end_attempt("done")
        assert [one.get("reason") for one in second.attempts()] == [None, "done"], case


def test_a_later_file_never_passes_for_the_one_that_was_written(tmp_path):
    first = start(tmp_path)
    first.lineage.write_text("{")
    assert first.is_ours()
    for _ in range(50):  # file systems give the inode number of a replaced file to one of the next
        with atomic_write(first.lineage) as file:
            file.write(b"{")
        assert not first.is_ours()


def test_without_a_lineage_the_owner_of_the_lock_owns_the_run(tmp_path):
    first = RunDirectory(tmp_path)
    first.open_for_training()
    first.begin_attempt(newest_step=None)
    first.lineage.unlink()
    assert first.is_ours()
    (tmp_path / ".lock").unlink()  # the folder was removed, and another run has begun there
    assert not first.is_ours()
    (tmp_path / ".lock").touch()
    assert not first.is_ours()


def test_a_record_of_many_attempts_stays_small_and_keeps_the_runs_name(tmp_path, monkeypatch):
    monkeypatch.setattr("ecar_dist.runtime.run.lineage.MAX_ATTEMPTS", 3)
    names = [start(tmp_path).run_id for _ in range(6)]
    assert len(set(names)) == 1
    assert len(RunDirectory(tmp_path).attempts()) == 3


def test_a_lock_that_is_not_a_file_is_refused_and_not_waited_for(tmp_path):
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        run = tmp_path / str(number)
        run.mkdir()
        make(run / ".lock")
        with pytest.raises(ConfigError, match=rf"{run}/\.lock "):
            RunDirectory(run).open_for_training()


def test_a_file_with_the_name_of_a_folder_is_named(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "run/logs").rmdir()
    (tmp_path / "run/logs").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/run/logs "):
        start(tmp_path / "run")


def test_a_directory_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{run} .*chmod o-w"):
        RunDirectory(run).open_for_training()
    run.chmod(0o755)
    tmp_path.chmod(0o1777)
    owner = RunDirectory(run)
    owner.open_for_training()  # our own, in a folder like /tmp
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(ConfigError, match=f"{run} "):
        RunDirectory(run).open_for_training()
    tmp_path.chmod(0o775)  # a group's folder: a colleague continues the run
    owner._lock.close()
    RunDirectory(run).open_for_training()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="symbolic links"):
        RunDirectory(tmp_path / "run").open_for_training()
    assert victim.read_text() == "precious"


def test_an_attempt_knows_its_versions(tmp_path):
    assert start(tmp_path / "run").attempts()[0]["torch"] == torch.__version__


def test_a_run_keeps_its_name(tmp_path):
    names = {start(tmp_path / "run").run_id for _ in range(2)}
    (tmp_path / "run").rename(tmp_path / "moved")
    assert names == {RunDirectory(tmp_path / "moved").run_id}
    assert names != {start(tmp_path / "run").run_id}


@pytest.mark.parametrize(
    ("latents", "mode"),
    [("s3://bucket/latents", 0o644), ("https://host/set?X-Amz-Signature=key", 0o600), ("s3://u:pw@b/x", 0o600)],
)
def test_only_the_owner_can_read_a_config_with_a_key_in_a_url(tmp_path, latents, mode):
    config = make_config(num_stages=2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"latents": latents})})
    RunDirectory(tmp_path).write_config(config)
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == mode


def test_a_disk_too_full_for_the_lock_file_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory = RunDirectory(tmp_path / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            directory.open_for_training()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "run" / ".lock")
