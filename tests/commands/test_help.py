"""The help text of every argument of both programs."""

import argparse
import re
import shlex
import subprocess

import pytest

from data_tools import cli as data_cli
from ecar_dist import cli as dist_cli
from ecar_dist.commands.examples import EXAMPLES

PROGRAMS = {"ecar-dist": dist_cli, "ecar-data": data_cli}
WORDS_OF_A_DEFAULT = re.compile(r"(\(required\)|\(default: [^()]+(\([^()]*\))?[^()]*\))$")


def parsers_of(parser):
    """A parser and those of its commands and verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)


def arguments_of(program):
    """Command, argument and help text, as --help shows it."""
    for parser in parsers_of(PROGRAMS[program]._parser()):
        shown = parser._get_formatter()
        for action in parser._actions:
            if (
                not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
                and action.help != "==SUPPRESS=="
            ):
                yield parser.prog, action, shown._expand_help(action) if action.help else ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_has_a_help_text_and_names_its_default(program):
    missing = []
    found = list(arguments_of(program))
    assert len(found) > 30
    for command, action, text in found:
        name = f"{command} {'/'.join(action.option_strings) or action.dest}"
        # Required options, flags, options that may be repeated, and positional arguments have no default to name.
        has_default = action.option_strings and not action.required and action.nargs != 0
        has_default = has_default and not isinstance(action, argparse._AppendAction)
        if not text or (has_default and not WORDS_OF_A_DEFAULT.search(text)):
            missing.append(f"{name}: {text}")
    assert missing == []


def words_of(example):
    """An example without its launcher and redirection, as the words of a command line."""
    line = example.partition(" > ")[0]
    return shlex.split(line.partition("-m ecar_dist ")[2] if "-m ecar_dist " in line else line.partition(" ")[2])


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_every_command_ends_with_examples_that_it_accepts(program):
    parsers = list(parsers_of(PROGRAMS[program]._parser()))
    assert {parser.prog for parser in parsers[1:]} == {name for name in EXAMPLES if name.startswith(program)}
    for parser in parsers[1:]:
        shown = parser.format_help().splitlines()
        for example in EXAMPLES[parser.prog]:
            assert f"  {example}" in shown
            parsed, rest = parsers[0].parse_known_args(words_of(example))
            assert all(dist_cli._OVERRIDE.match(word) for word in rest), example
            assert hasattr(parsed, "run") or hasattr(parsed, "command")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_can_complete_commands_and_options(program, shell, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program].main(["--print-completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    option = {"ecar-dist": "--guidance-interval", "ecar-data": "--samples-per-shard"}[program]
    assert option in script
    if shell == "bash":
        (tmp_path / "completion").write_text(script)
        subprocess.run(["bash", "-n", str(tmp_path / "completion")], check=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_programs_print_their_version(program, capsys):
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program].main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(rf"{program} \d+\.\d+\.\d+\n", capsys.readouterr().out)
