"""The result of ablations.py as Markdown tables and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SOLVERS = ("euler", "heun", "midpoint")


def report(result: dict[str, Any]) -> str:
    parts = [
        variant_table(result["variants"]),
        solver_table(result),
        tau_table(result["closed form tau"]),
        sign_table(result["signs"]),
    ]
    return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_seeds(values: Sequence[float], form: str) -> str:
    """The mean, and the values of the seeds in brackets if there are several."""
    mean, seeds = format(statistics.mean(values), form), ", ".join(format(value, form) for value in values)
    return f"{mean} ({seeds})" if len(values) > 1 else mean


def variant_table(variants: dict[str, Row]) -> str:
    bands = list(next(iter(variants.values()))["band variance ratio"])
    header = ["variant", "samples seen", "TMAC training", "MMAC a sample", "steps", "loss", "FD-digits", "accuracy"]
    rows = [
        [
            name,
            f"{row['samples_seen']:,}",
            f"{row['training_macs'] / 1e12:.2f}",
            f"{row['sampling_macs'] / 1e6:.0f}",
            str(row["draw"]["steps_per_stage"]),
            with_seeds(row["loss"]["seeds"], ".4f"),
            with_seeds(row["FD-digits"]["seeds"], ".1f"),
            f"{row['class accuracy']['mean']:.3f}",
            *(f"{row['band variance ratio'][band]['mean']:.2f}" for band in bands),
        ]
        for name, row in variants.items()
    ]
    return markdown([*header, *(f"var {band}" for band in bands)], rows)


def solver_table(result: dict[str, Any]) -> str:
    header = [
        "solver",
        "calls a stage",
        "FD-digits",
        "variance share",
        "closed form: covariance error",
        "variance share",
    ]
    pairs = zip(result["solvers"]["rows"], result["closed form solvers"], strict=True)
    rows = [
        [
            row["solver"],
            str(row["calls"]),
            with_seeds(row["FD-digits"]["seeds"], ".1f"),
            with_seeds(row["variance share"]["seeds"], ".3f"),
            f"{exact['covariance error']:.2g}",
            f"{exact['variance share']:.3f}",
        ]
        for row, exact in pairs
    ]
    return f"{markdown(header, rows)}\n\nTrained: {', '.join(result['solvers']['runs'])}"


def tau_table(taus: Sequence[Row]) -> str:
    header = ["tau, closed form", "loss", *(f"covariance error, 16 calls of {solver}" for solver in SOLVERS)]
    rows = [[f"{row['tau']:g}", f"{row['loss']:.4f}", *(f"{row[solver]:.2g}" for solver in SOLVERS)] for row in taus]
    rows.append(["no context", f"{taus[0]['loss without context']:.4f}", *("" for _ in SOLVERS)])
    return markdown(header, rows)


def sign_table(signs: Sequence[Row]) -> str:
    rows = [
        [
            one["expected"],
            with_seeds(one["smaller"], ".4g"),
            with_seeds(one["larger"], ".4g"),
            f"{'as expected' if one['found'] else 'NOT as expected'} ({one['seeds']} of {len(one['smaller'])})",
        ]
        for one in signs
    ]
    return markdown(["expected", "left", "right", "found (in how many seeds)"], rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """Against solver calls a stage: FD-digits of the trained reference, and variance, trained and in closed form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for solver, color in zip(SOLVERS, ("tab:orange", "tab:green", "tab:blue"), strict=True):
        rows = [row for row in result["solvers"]["rows"] if row["solver"] == solver]
        exact = [row for row in result["closed form solvers"] if row["solver"] == solver]
        calls = [row["calls"] for row in rows]
        left.plot(calls, [row["FD-digits"]["mean"] for row in rows], "o-", color=color, label=solver)
        shares = [row["variance share"]["mean"] for row in rows]
        right.plot(calls, shares, "o-", color=color, label=f"{solver}, trained on digits")
        shares = [row["variance share"] for row in exact]
        right.plot(calls, shares, "x--", color=color, label=f"{solver}, closed form", linewidth=0.8)
    first = result["solvers"]["rows"][0]
    left.axhline(first["FD-digits reconstructions"], color="gray", linestyle=":", label="real, after the autoencoder")
    left.axhline(first["FD-digits real-vs-real floor"], color="gray", linestyle="--", label="real (floor)")
    left.set(yscale="log", ylabel="FD-digits, lower is better")
    right.axhline(1.0, color="gray", linestyle="--")
    right.set(ylabel="variance of samples / of data")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(calls_of(result), [str(calls) for calls in calls_of(result)])
        axes.set_xlabel("velocity calls a stage")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def calls_of(result: dict[str, Any]) -> list[int]:
    return sorted({row["calls"] for row in result["solvers"]["rows"]})
