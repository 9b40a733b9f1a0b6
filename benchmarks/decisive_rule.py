"""The rule of `decisive.py`, fixed before the first run, and how its rows are shown.

The stages are **confirmed** if, in every training,
  1. `dit` on a uniform grid needs at least 16 calls to come within 5 % of its best FD and its best bands, and
  2. a staged kind reaches `dit`'s best FD plus two standard errors with at most 1 / 1.4 of the MACs that `dit` needs
     with its best time shift.
They are **refuted** if, in every training, no staged setting is better than `dit` at the same MACs or fewer by more
than two standard errors. Everything else is **undecided**.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALLEST_EIGENVALUE = 100.0  # within a class, of latents at unit variance
MANY_CALLS = 16
NEAR = 1.05
SAVING = 1.4
STAGED = ("ecar", "pyramid")

Row = dict[str, Any]


def row(kind: str, grid: str, training: int, setting: dict[str, Any], scores: Sequence[dict[str, Any]]) -> Row:
    """One setting of one training over its sampling seeds, on the second half of the held-out images."""
    distances = [one["FD"][1] for one in scores]
    worst = [band_error(one["bands"][1]) for one in scores]
    first = scores[0]
    return {
        "kind": kind,
        "grid": grid,
        "training": training,
        "setting": setting,
        "calls": first["calls"],
        "macs": first["sampling_macs"],
        "FD": statistics.mean(distances),
        "SE": statistics.stdev(distances) / math.sqrt(len(distances)),
        "FD of each sampling seed": distances,
        "band error": statistics.mean(worst),
        "accuracy": statistics.mean(one["accuracy"] for one in scores),
        "training_macs": first["training_macs"],
        "parameters": first["parameters"],
    }


def band_error(bands: dict[str, float]) -> float:
    """The largest factor between the variance of an octave in the samples and in real images, in either direction."""
    return max(max(ratio, 1.0 / ratio) if ratio > 0 else math.inf for ratio in bands.values())


def decide(rows: Sequence[Row]) -> dict[str, Any]:
    """`confirmed`, `refuted` or `undecided`, with the findings of each training."""
    trainings = [
        one_training([one for one in rows if one["training"] == seed])
        for seed in sorted({one["training"] for one in rows})
    ]
    confirmed = all(one["calls of dit"] >= MANY_CALLS and one["saving"] >= SAVING for one in trainings)
    refuted = not any(one["better at equal MACs"] for one in trainings)
    result = "confirmed" if confirmed else "refuted" if refuted else "undecided"
    lines = [
        f"training {number}: dit needs {one['calls of dit']} calls on a uniform grid; to dit's best FD + 2 SE "
        f"({one['threshold']:.2f}) the stages need 1/{one['saving']:.2f} of its MACs; staged settings that beat it at "
        f"equal MACs: {len(one['better at equal MACs'])}"
        for number, one in enumerate(trainings)
    ]
    return {"result": result, "trainings": trainings, "lines": [*lines, f"verdict: {result}"]}


def one_training(rows: Sequence[Row]) -> dict[str, Any]:
    """The values of one training that the rule uses.

    saving: MACs of the cheapest setting of `dit` that reaches the threshold, over those of the cheapest staged one; 0
    if no staged one does.
    """
    dit = [one for one in rows if one["kind"] == "dit"]
    staged = [one for one in rows if one["kind"] in STAGED]

    # How many calls dit needs without a shift.
    uniform = [one for one in dit if one["grid"] == "uniform"]
    least = {key: min(one[key] for one in uniform) for key in ("FD", "band error")}
    near = [one["calls"] for one in uniform if all(one[key] <= NEAR * least[key] for key in least)]
    # If no setting is near both minima, not even the largest number of calls is enough.
    needed = min(near, default=max(one["calls"] for one in uniform))

    # The cost of the best FD, with any shift.
    best = min(dit, key=lambda one: one["FD"])
    threshold = best["FD"] + 2.0 * best["SE"]
    cheapest = {
        name: min((one["macs"] for one in some if one["FD"] <= threshold), default=math.inf)
        for name, some in (("dit", dit), ("staged", staged))
    }

    # At equal MACs.
    better = []
    for one in staged:
        rivals = [other for other in dit if other["macs"] <= one["macs"]]
        if not rivals:
            continue
        rival = min(rivals, key=lambda other: other["FD"])
        if rival["FD"] - one["FD"] > 2.0 * math.hypot(one["SE"], rival["SE"]):
            better.append({"kind": one["kind"], "setting": one["setting"], "gain": rival["FD"] - one["FD"]})
    return {
        "calls of dit": needed,
        "threshold": threshold,
        "saving": cheapest["dit"] / cheapest["staged"],
        "better at equal MACs": better,
    }


def table(rows: Sequence[Row]) -> str:
    """One line per kind and setting, over trainings and sampling seeds, in Markdown."""
    columns = "kind | grid | steps | shift | guidance | calls | MMAC a sample | FD | sd over trainings | over samplings"
    lines = [f"| {columns} | band error | accuracy |", "|---" * 12 + "|"]
    settings: dict[tuple[str, str, str], list[Row]] = {}
    for one in rows:
        settings.setdefault((one["kind"], one["grid"], str(one["setting"])), []).append(one)
    lines += [f"| {kind} | {grid} | {' | '.join(_cells(some))} |" for (kind, grid, _), some in settings.items()]
    return "\n".join(lines)


def _cells(some: Sequence[Row]) -> list[str]:
    """The cells of one setting, over its trainings."""
    setting = some[0]["setting"]
    steps = ", ".join(map(str, setting["steps_per_stage"]))

    def mean(key: str) -> float:
        return statistics.mean(one[key] for one in some)

    between = statistics.stdev([one["FD"] for one in some]) if len(some) > 1 else math.nan
    within = statistics.mean(statistics.stdev(one["FD of each sampling seed"]) for one in some)
    return [
        f"{setting.get('solver', 'midpoint')} {steps}",
        f"{setting['time_shift']:g}",
        guidance_words(setting),
        str(some[0]["calls"]),
        f"{some[0]['macs'] / 1e6:.0f}",
        f"{mean('FD'):.2f}",
        f"{between:.2f}",
        f"{within:.2f}",
        f"{mean('band error'):.2f}",
        f"{mean('accuracy'):.3f}",
    ]


def guidance_words(setting: dict[str, Any]) -> str:
    if setting["guidance_scale"] == 1.0:
        return "none"
    low, high = setting["guidance_interval"]
    where = "" if (low, high) == (0.0, 1.0) else f" in {low:g} to {high:g}"
    return f"{setting['guidance_scale']:g} {setting['guidance_ramp']}{where}"


def plot(rows: Sequence[Row], floor: float, path: Path) -> None:
    """FD against MACs a sample: the mean over trainings, with the range of all trainings and sampling seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, grid in dict.fromkeys((one["kind"], one["grid"]) for one in rows):
        # All distances at each number of MACs.
        points: dict[float, list[float]] = {}
        for one in rows:
            if (one["kind"], one["grid"]) == (kind, grid):
                points.setdefault(one["macs"] / 1e9, []).extend(one["FD of each sampling seed"])
        macs = sorted(points)
        mean = [statistics.mean(points[each]) for each in macs]
        below = [at - min(points[each]) for at, each in zip(mean, macs, strict=True)]
        above = [max(points[each]) - at for at, each in zip(mean, macs, strict=True)]
        label = f"{kind}, {grid} grid"
        axes.errorbar(macs, mean, [below, above], marker="o", markersize=4, capsize=2, label=label)
    axes.axhline(floor, color="gray", linestyle="--", label="real (floor)")
    axes.set(xscale="log", yscale="log", xlabel="GMAC a sample, guidance included", ylabel="FD, lower is better")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
