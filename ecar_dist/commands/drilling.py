"""`ecar-dist drill`: faults on purpose."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecar_dist.command_line import AddCommand, positive


def add_commands(add: AddCommand) -> None:
    help = "let a fault strike a small copy of a run, and see whether it survives as promised"
    drilling = add("drill", drill, help)
    drilling.add_argument("names", metavar="NAME", help="all, one drill, or several with commas")
    drilling.add_argument("config", type=Path, help="YAML file of the run")
    drilling.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="overrides of single config values")
    drilling.add_argument("--ranks", type=positive, default=2, help="processes to start (default 2)")
    drilling.add_argument("--keep", type=Path, help="folder for the runs and their logs (default: removed at the end)")
    drilling.add_argument("--skip", default="", help="drills to leave out, with commas")
    drilling.add_argument("--json", type=Path, help="file for the table as JSON")
    drilling.add_argument("--markdown", type=Path, help="file for the table as Markdown")


def drill(parsed: argparse.Namespace) -> int:
    from ecar_dist.drills.run import run_drills

    return run_drills(
        parsed.names.split(","),
        parsed.config,
        parsed.overrides,
        ranks=parsed.ranks,
        keep=parsed.keep,
        skip=parsed.skip.split(",") if parsed.skip else (),
        json_file=parsed.json,
        markdown_file=parsed.markdown,
    )
