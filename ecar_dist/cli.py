"""`ecar-dist`: parse, build, call. Every command imports what it needs when it runs, so --help and check are instant.

Exit status: 0 done; 1 an error the user can fix, one line on stderr; 75 stopped early, nothing lost (EX_TEMPFAIL: run
the same command again); 93 fails again and again without progress; the others are in command_line.py.
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
from ecar_dist.command_line import CommandParser, prepare_process, run_command
from ecar_dist.commands import checkpoints, drilling, generation, submitting, training, watching

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def entry() -> NoReturn:
    """The console script: `main`, then out at once.

    When a rank's work is done and on disk, the interpreter's teardown of communication threads can still abort the
    process (SIGABRT, about once in 15 CPU runs), and the launcher would take the whole job for failed.
    """
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody can read it: the work is done all the same
            stream.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        prepare_process()
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all(_OVERRIDE.match(word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after a flag
        parsed.overrides += rest
    return run_command("ecar-dist", lambda: parsed.run(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ecar-dist", description="Train, sample and score ECAR image generators.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # The deepspeed launcher passes this to whatever it starts; the rank is read from LOCAL_RANK, under every launcher.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    training.add_commands(add)
    generation.add_commands(add)
    checkpoints.add_verbs(commands.add_parser("checkpoint", help="look into a run's checkpoints, or export one"))
    submitting.add_commands(add)
    drilling.add_commands(add)
    watching.add_commands(add)
    return parser
