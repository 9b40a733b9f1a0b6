"""`ecar-dist drill`: inject faults into a small copy of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecar_dist.command_line import AddCommand, positive
from ecar_dist.commands.run_config import add_config


def add_commands(add: AddCommand) -> None:
    drilling = add("drill", drill, "inject faults into a small copy of a run, and check that it survives them")
    drilling.add_argument("names", metavar="NAME", help="all, or one or more names of drills, separated by commas")
    add_config(drilling)
    drilling.add_argument("--ranks", type=positive, default=2, help="number of processes to start")
    drilling.add_argument(
        "--keep", type=Path, help="new folder for the runs and their logs (default: a temporary one, later removed)"
    )
    drilling.add_argument("--skip", default="", help="drills to skip, separated by commas (default: none)")
    drilling.add_argument("--json", type=Path, help="also write the results to this file, as JSON (default: no file)")
    drilling.add_argument(
        "--markdown", type=Path, help="also write the results to this file, as Markdown (default: no file)"
    )


def drill(parsed: argparse.Namespace) -> int:
    from ecar_dist.drills.run import run_drills

    return run_drills(
        parsed.names.split(","),
        Path(parsed.config),
        parsed.overrides,
        ranks=parsed.ranks,
        keep=parsed.keep,
        skip=parsed.skip.split(",") if parsed.skip else (),
        json_file=parsed.json,
        markdown_file=parsed.markdown,
    )
