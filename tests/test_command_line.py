import errno
import os

import pytest

from data_tools.cli import main as ecar_data
from ecar_dist.command_line import counted, run_command, say
from ecar_dist.errors import DataError


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
        (KeyboardInterrupt(), 130, "ecar-x: interrupted; run the same command again to go on\n"),
    ],
)
def test_what_went_wrong_is_one_line(error, status, line, capsys):
    assert ending(error, capsys) == (status, line)


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
        (["encode", "a", "b", "--vae", "dct-f8", "--samples-per-shard", "0"], "0 is no whole number of at least 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--batch-size", "-5"], "-5 is no whole number of at least 1"),
        (["encode", "a", "b", "--vae", "dct-f8", "--device", "gpu"], "gpu is none of auto, cpu, cuda"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        ecar_data(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_log_that_nobody_reads_any_more_does_not_end_the_work(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", gone)
        say("step 1")
        say("step 2")
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())  # or closing it would fail
