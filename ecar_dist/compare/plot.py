"""The curves of several runs as a picture. Needs matplotlib, the optional extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecar_dist.compare.curves import AXES, RunCurves
from ecar_dist.compare.table import NAMES, TITLES, short_names
from ecar_dist.errors import ConfigError
from ecar_dist.storage.atomic import naming


def plot_curves(runs: Sequence[RunCurves], file: Path) -> None:
    """Train and validation loss by samples, FLOPs and hours, as a PNG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import StrMethodFormatter
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with `pip install 'ecar-dist[plot]'`") from None

    # A row for each curve that some run has.
    rows = [curve for curve in ("loss", "validation_ema") if any(run.series("samples", curve)[0] for run in runs)]
    figure = Figure(figsize=(12, 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(AXES), squeeze=False, sharex="col", sharey="row")
    for row, curve in zip(grid, rows, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            for name, run in zip(short_names(runs), runs, strict=True):
                axes.plot(*run.series(axis, curve), label=name, linewidth=1.5)
            axes.set_xlabel(TITLES[axis])
            axes.grid(alpha=0.3)
        row[0].set_ylabel(NAMES[curve])
        row[0].set_yscale("log")
        row[0].yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        row[0].yaxis.set_minor_formatter(StrMethodFormatter("{x:.3g}"))
    grid[0][-1].legend()
    with naming(file):
        figure.savefig(file, dpi=100, format="png")
