"""status and compare: read the files of runs, without torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ecar_dist.command_line import AddCommand, error_line, positive
from ecar_dist.errors import EcarError

if TYPE_CHECKING:
    from ecar_dist.cluster.status import RunStatus

_CLEAR = "\033[H\033[2J"


def add_commands(add: AddCommand) -> None:
    looking = add("status", status, "state, progress, last checkpoint and last problem of runs (no torch, no Slurm)")
    looking.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory, or folder of run directories; several are shown as a table",
    )
    looking.add_argument("--json", action="store_true", help="print one line of JSON per run, with times in seconds")
    looking.add_argument(
        "--watch", type=positive, metavar="SECONDS", help="repeat every SECONDS seconds until Ctrl-C (default: once)"
    )

    comparing = add("compare", compare, "losses and scores of runs at equal samples, FLOPs and hours (no torch)")
    comparing.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; two or more")
    comparing.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    comparing.add_argument(
        "--plot", type=Path, metavar="FILE", help="also plot the curves to this PNG file (default: no plot)"
    )


def compare(parsed: argparse.Namespace) -> int:
    from ecar_dist.compare.curves import differences, read_curves
    from ecar_dist.compare.plot import plot_curves
    from ecar_dist.compare.table import comparison, comparison_lines

    # A single run also makes a table of its curves.
    runs = [read_curves(run) for run in parsed.runs]
    tree = comparison(runs, differences(runs))
    print(json.dumps(tree) if parsed.json else "\n".join(comparison_lines(tree)))
    if parsed.plot:
        plot_curves(runs, parsed.plot)
    return 0


def status(parsed: argparse.Namespace) -> int:
    """Exit status 1 if one of the paths is not a run directory."""
    try:
        while True:
            found = _look(parsed.runs)
            lines = _lines(found, as_json=parsed.json)
            print((_CLEAR if parsed.watch and sys.stdout.isatty() else "") + "\n".join(lines), flush=True)
            if not parsed.watch:
                return 1 if any(isinstance(one, str) for one in found) else 0
            time.sleep(parsed.watch)
    except KeyboardInterrupt:
        if not parsed.watch:
            raise
        return 0


def _look(runs: list[Path]) -> list[RunStatus | str]:
    """The status of each run, or an error message. For a single run the error is raised."""
    from ecar_dist.cluster.status import run_status

    found: list[RunStatus | str] = []
    for run in runs:
        try:
            found.append(run_status(run))
        except (EcarError, OSError) as error:
            # Perhaps it is a folder of run directories.
            if within := _runs_in(run):
                found += within
                continue
            if len(runs) == 1:
                raise
            found.append(error_line(error))
    return found


def _runs_in(folder: Path) -> list[RunStatus | str]:
    """The status of each run in a folder of runs."""
    from ecar_dist.cluster.status import run_status

    found: list[RunStatus | str] = []
    for path in sorted(folder.glob("*/")):
        with contextlib.suppress(EcarError, OSError):
            found.append(run_status(path))
    return found


def _lines(found: list[RunStatus | str], *, as_json: bool) -> list[str]:
    from ecar_dist.cluster.status import status_block, status_table

    if as_json:
        return [json.dumps({"error": one} if isinstance(one, str) else asdict(one)) for one in found]
    if len(found) == 1 and not isinstance(found[0], str):
        return status_block(found[0])
    return status_table(found)
