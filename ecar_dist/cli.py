"""`ecar-dist`: parse, build, call. Every command imports what it needs when it runs, so --help and check are fast.

Exit status: 0 done; 1 an error that the user can fix, one line on stderr; 75 (EX_TEMPFAIL) stopped early with nothing
lost, run the same command again; 93 failed repeatedly without progress. The others are in command_line.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ecar_dist import __version__
from ecar_dist.command_line import CommandParser, finish_parser, prepare_process, run_command
from ecar_dist.commands import (
    checkpoints,
    drilling,
    generation,
    proposing,
    quantizing,
    scoring,
    submitting,
    training,
    watching,
)
from ecar_dist.commands.examples import EXAMPLES

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def entry() -> NoReturn:
    """The console script: run `main`, then exit without the teardown of the interpreter.

    When the work of a rank is done and on disk, the teardown of communication threads can still abort the process
    (SIGABRT, about once in 15 CPU runs), and the launcher would report that the entire job failed.
    """
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader has ended; the work is done
            stream.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        prepare_process()
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all(_OVERRIDE.match(word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option
        parsed.overrides += rest
    return run_command("ecar-dist", lambda: parsed.run(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ecar-dist", description="Train, sample and score ECAR image generators.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # The deepspeed launcher passes this to every process. It is not used: the rank is read from LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    proposing.add_commands(add)
    training.add_commands(add)
    generation.add_commands(add)
    scoring.add_commands(add)
    quantizing.add_commands(add)
    checkpoints.add_verbs(commands.add_parser("checkpoint", help="inspect the checkpoints of a run, or export one"))
    submitting.add_commands(add)
    drilling.add_commands(add)
    watching.add_commands(add)
    finish_parser(parser, EXAMPLES)
    return parser
