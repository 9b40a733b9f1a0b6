import argparse
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main as ecar_dist
from ecar_dist.command_line import columns, counted, duration, not_negative, positive, prepare_process, run_command, say
from ecar_dist.data.shards.write import ShardContent, write_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import write_json


@pytest.fixture
def no_file_over_4_kib(monkeypatch):
    """Like a full disk: a write to an open file fails, and the error names no file."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # bytecode would be cut to 4 KiB, and kept
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


ROOT = Path(__file__).parents[1]


def ending(error, capsys):
    def action():
        raise error

    status = run_command("ecar-x", action)
    printed = capsys.readouterr()
    assert printed.out == ""
    return status, printed.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("a.tar is cut; restore it"), 1, "ecar-x: a.tar is cut; restore it\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"),
            1,
            "ecar-x: /data/x: No space left on device; free space there, or give another folder\n",
        ),
        (OSError("strange"), 1, "ecar-x: strange; ECAR_TRACEBACK=1 shows where it happened\n"),
        (KeyboardInterrupt(), 130, "ecar-x: interrupted; run the same command again to continue\n"),
    ],
)
def test_what_went_wrong_is_one_line(error, status, line, capsys):
    assert ending(error, capsys) == (status, line)


def test_durations_have_two_units():
    said = {-1: "0s", 7.4: "7s", 95: "1m35s", 3599.6: "1h00m", 3725: "1h02m", 86_399: "23h59m", 90_000: "1d01h"}
    assert {seconds: duration(seconds) for seconds in said} == said


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("run", "step", "note"), ("a", "1,200", ""), ("long", "7", "x")]
    assert columns(rows) == ["run    step  note", "a     1,200", "long      7     x"]
    assert columns(rows, left=(0, 2))[2] == "long      7  x"


@pytest.mark.parametrize(("number", "said"), [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks"), (1024, "1,024 ranks")])
def test_things_are_counted_in_words(number, said):
    assert counted(number, "rank") == said


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError(), capsys)


def test_the_traceback_of_a_system_error_on_request(monkeypatch, capsys):
    monkeypatch.setenv("ECAR_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        ending(PermissionError(errno.EACCES, "no", "x"), capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["index", "photos", "s3://bucket/out"], "s3://bucket/out is a URL, this must be a local folder"),
        (["verify", "s3://bucket/set"], "ecar-data push FOLDER URL"),
        (["encode", "a", "b", "--vae", "dct-f8", "--samples-per-shard", "0"], "0 is not a whole number from 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--batch-size", "-5"], "-5 is not a whole number from 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--batch-size", "9" * 30], "is not a whole number from 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--batch-size", "9" * 5000], "is not a whole number from 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--batch-size", "²"], "is not a whole number from 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--device", "gpu"], "gpu is not a device; give auto, cpu, cuda"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        ecar_data(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "check", "plan", "submit", "preflight"])
def test_only_what_is_needed_is_called_missing(command, capsys):
    with pytest.raises(SystemExit):
        ecar_dist([command])
    assert "a.b=c" not in capsys.readouterr().err.splitlines()[-1]


def test_a_log_that_nobody_reads_any_more_does_not_end_the_work(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", gone)
        say("step 1")
        say("step 2")
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())  # or closing it would fail


def write_shard(folder):
    content = ShardContent(0, np.zeros((64, 4, 3, 2), np.float16), np.zeros(64, np.int64))
    write_latent_shard(folder, 0, content, {"encoder": {}, "plan_id": "p"})


WRITERS = {
    "manifest.json": lambda folder: write_json(folder / "manifest.json", list(range(5000))),
    "000000.tar": write_shard,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_takes_no_more_is_named(name, tmp_path, no_file_over_4_kib):
    with pytest.raises(OSError, match="File too large") as caught:
        WRITERS[name](tmp_path)
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_images_is_named(tmp_path, no_file_over_4_kib, capsys):
    assert ecar_data(["shard", "digits", str(tmp_path / "images")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ecar-data: ")]
    assert f"{tmp_path / 'images'}: File too large" in line


PROGRAMS = {
    "ecar-dist": ["ecar_dist", "check", "configs/digits_cpu.yaml"],
    "ecar-data": ["data_tools", "index", "--help"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_nobody_reads_does_not_change_the_end(program, closed):
    words = [sys.executable, "-m", *PROGRAMS[program]]
    script = f"{' '.join(words)} {closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


LOCALES = {"LC_ALL": "POSIX", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("program", ["ecar_dist", "data_tools"])
def test_a_locale_without_utf8_reads_files_as_utf8_all_the_same(program):
    """In the same process: a launcher waits for it, and signals it."""
    script = (
        f"import sys, os, subprocess; from {program}.cli import main; sys.argv[1:] = ['--help']\n"
        "print(os.getpid(), sys.flags.utf8_mode, flush=True); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=os.environ | LOCALES
    )
    assert done.returncode == 0, done.stderr
    (first, before), (again, after) = (line.split() for line in done.stdout.splitlines() if line[:1].isdigit())
    assert (before, after) == ("0", "1")
    assert first == again


def test_what_a_terminal_would_obey_is_not_in_the_error_line(capsys):
    def fail():
        raise DataError("a\rb\x1b[2J\nc does not exist")

    assert run_command("ecar-data", fail) == 1
    assert capsys.readouterr().err == "ecar-data: a b [2J c does not exist\n"


@pytest.mark.parametrize("number", [positive, not_negative])
def test_a_url_in_the_place_of_a_number_is_cut_after_its_secrets_are_out(number):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        number("hdfs://AKIAPLANTEDUSER0:planted-password-of-a-url@127.0.0.1/set")
    assert "AKIA" not in str(refused.value)


def test_a_long_error_keeps_its_beginning_and_its_fix(capsys):
    def fail():
        raise DataError(f"{'x' * 60_000} does not exist; check the path")

    assert run_command("ecar-data", fail) == 1
    said = capsys.readouterr().err
    assert len(said) < 4_100
    assert said.startswith("ecar-data: xxx")
    assert said.endswith("does not exist; check the path\n")


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given, found, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    prepare_process()
    assert os.environ["OMP_WAIT_POLICY"] == found
