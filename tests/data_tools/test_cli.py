import argparse
import subprocess
import sys

import pytest

from data_tools.cli import _parser, main
from ecar_dist import __version__
from ecar_dist.cli import main as ecar_dist_main
from ecar_dist.errors import DataError


def test_an_error_is_one_line_and_status_1(tmp_path, capsys):
    assert main(["finalize", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ecar-data: ")
    assert printed.err.count("\n") == 1


def test_the_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_TRACEBACK", "1")
    with pytest.raises(DataError):
        main(["finalize", str(tmp_path)])


@pytest.mark.parametrize("command", [[], ["shard"], ["train-vae"], ["encode"], ["finalize"], ["verify"], ["preview"]])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: ecar-data" in capsys.readouterr().out


def test_every_option_says_what_it_is():
    """Ten and more were blank; a default is shown by the formatter, so it has to be there and not None."""
    blank = [
        f"{name} {'/'.join(action.option_strings) or action.dest}"
        for name, parser in subcommands(_parser())
        for action in parser._actions
        if not action.help
    ]
    assert blank == []


def subcommands(parser):
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return choices.items()


@pytest.mark.parametrize(("program", "run"), [("ecar-data", main), ("ecar-dist", ecar_dist_main)])
def test_the_version(program, run, capsys):
    with pytest.raises(SystemExit) as caught:
        run(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{program} {__version__}\n"


def test_help_needs_no_heavy_library():
    code = (
        "import sys, data_tools.cli; print([m for m in ('torch', 'nvidia', 'diffusers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    module = subprocess.run([sys.executable, "-m", "data_tools", "--help"], capture_output=True, text=True, check=True)
    assert "train-vae" in module.stdout
