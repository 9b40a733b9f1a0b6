import argparse
import re
import subprocess
import sys

import pytest

from data_tools.cli import COMMANDS, _parser, main
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


def test_every_option_has_a_help_with_its_default():
    wrong = []
    for name, parser in subcommands(_parser()).items():
        formatter = parser._get_formatter()
        for action in parser._actions:
            shown = formatter._expand_help(action) if action.help else ""
            takes_a_value = action.option_strings and action.nargs != 0
            if not shown or (takes_a_value and not re.search(r"\((default: (?!None)|required\))", shown)):
                wrong.append(f"{name} {'/'.join(action.option_strings) or action.dest}: {shown!r}")
    assert not wrong, "\n".join(wrong)


def test_every_command_has_a_function_of_its_name():
    assert subcommands(_parser()).keys() == COMMANDS.keys()
    assert [function.__name__ for function in COMMANDS.values()] == [f"_{name.replace('-', '_')}" for name in COMMANDS]


def subcommands(parser):
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return choices


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
