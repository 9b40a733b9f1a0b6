"""Runs side by side: what `ecar-dist compare` prints, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecar_dist.command_line import columns
from ecar_dist.compare.curves import AXES, CURVES, RunCurves
from ecar_dist.storage.untrusted import printable

SHARES = (0.25, 0.5, 0.75, 1.0)  # of what all runs have reached
TITLES = {"samples": "samples", "flops": "training FLOPs", "hours": "hours of training"}
NAMES = {"loss": "train loss", "validation": "validation", "validation_ema": "validation EMA"}


def short_names(runs: Sequence[RunCurves]) -> list[str]:
    """The last parts of the paths, as many as are needed to tell the runs apart."""
    paths = [Path(run.run).absolute().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return [printable(name, 60) for name in names]
    return [f"{printable(run.run, 60)} ({number})" for number, run in enumerate(runs, 1)]


def comparison(runs: Sequence[RunCurves], notes: Sequence[str]) -> dict[str, Any]:
    """The whole comparison as JSON values: each curve of each run at equal points on each axis."""
    names = short_names(runs)
    places = {axis: [share * min(run.end(axis) for run in runs) for share in SHARES] for axis in AXES}
    return {
        "runs": [_facts(name, run) for name, run in zip(names, runs, strict=True)],
        "notes": list(notes),
        "equal": {
            axis: [
                {"at": x, **{curve: [run.at(axis, curve, x) for run in runs] for curve in CURVES}} for x in places[axis]
            ]
            for axis in AXES
        },
    }


def _facts(name: str, run: RunCurves) -> dict[str, Any]:
    return {
        "name": name,
        "run": run.run,
        "kind": run.config.model.kind,
        "preset": run.config.model.preset,
        "ranks": run.ranks,
        **{axis: run.end(axis) for axis in AXES},
        "dataset_ids": list(run.dataset_ids),
        "heldout_id": run.heldout_id,
        "scores": run.scores,
    }


def comparison_lines(tree: dict[str, Any]) -> list[str]:
    """The comparison for people: the runs, a block for each axis, then the scores."""
    runs = tree["runs"]
    rows: list[tuple[str, ...]] = [("run", "model", "ranks", "samples", "training FLOPs", "hours")]
    rows += [
        (
            run["name"],
            f"{run['kind']} {run['preset']}",
            str(run["ranks"] or ""),
            *(_number(axis, run[axis]) for axis in AXES),
        )
        for run in runs
    ]
    lines = [*columns(rows, left=(0, 1)), *(f"note: {printable(note)}" for note in tree["notes"])]

    # Only curves that some run has.
    for axis in AXES:
        places = tree["equal"][axis]
        shown = [curve for curve in CURVES if any(value is not None for place in places for value in place[curve])]
        rows = [(f"equal {TITLES[axis]}", *(f"{NAMES[curve]}: {run['name']}" for curve in shown for run in runs))]
        rows += [
            (_number(axis, place["at"]), *(_loss(value) for curve in shown for value in place[curve]))
            for place in places
        ]
        lines += ["", *columns(rows, left=())]

    # Scores, each at the progress of its own evaluation.
    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    if names:
        rows = [("scores", *(run["name"] for run in runs))]
        rows += [(printable(name, 60), *(_score(run["scores"].get(name)) for run in runs)) for name in names]
        lines += ["", *columns(rows)]
    return lines


def _number(axis: str, value: float) -> str:
    return {"samples": f"{value:,.0f}", "flops": f"{value:.3g}", "hours": f"{value:.3g}"}[axis]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
