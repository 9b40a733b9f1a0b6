"""Quality against sampling compute: ECAR and its relatives on digits, at equal parameters and equal training MACs.

`python benchmarks/quality.py` takes one to two hours on two cores and goes on where it was stopped; `--share 0.02`
tries it out in minutes. The last line is JSON. See benchmarks/README.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rounds
from digits import ROOT, Draw, Run, measure, parser, prepare, side_by_side, train

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of

KINDS = {
    kind: ROOT / f"configs/digits_{'cpu' if kind == 'ecar' else kind}.yaml"
    for kind in ("ecar", "pyramid", "dit", "mar")
}
GUIDANCE = (1.0, 1.15, 1.3, 1.6, 2.0)
CHOOSING, SCORING = 0, 1  # seeds of the samples by which the guidance is chosen, and of those that are reported
STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "ecar": tuple({"steps_per_stage": steps} for steps in (1, 2, 4, 8)),
    "pyramid": tuple({"steps_per_stage": steps} for steps in (1, 2, 4, 8)),
    "dit": (
        *({"steps_per_stage": steps} for steps in (1, 2, 4, 8, 24)),
        {"solver": "euler", "steps_per_stage": 50},
    ),
    "mar": tuple({"ar_steps": steps, "steps_per_stage": inner} for steps, inner in ((2, 4), (4, 8), (8, 8), (16, 8))),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=3).parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    prepare(work)
    runs = runs_at_equal_compute(work, options.seeds, options.share)
    result = compare(work, runs, options.jobs)
    print(table(result))
    if options.plot:
        plot(result, options.plot)
    rounds.publish(result | {"hardware": options.hardware or rounds.hardware()}, options.save)


def runs_at_equal_compute(work: Path, seeds: int, share: float) -> list[Run]:
    """Every kind and seed, seed by seed; each sees as many samples as ECAR's training MACs pay for."""
    budget = macs_of(Run("ecar", 0, KINDS["ecar"]).load(work)) * share
    return [at_equal_compute(work, Run(kind, seed, KINDS[kind]), budget) for seed in range(seeds) for kind in KINDS]


def at_equal_compute(work: Path, run: Run, budget: float) -> Run:
    """The run with as many samples, in whole steps, as the budget in MACs pays for; its warm-up is in proportion."""
    config = run.load(work)
    steps = round(budget / kind_of(config).training_macs(config) / config.batch.global_batch_size)
    samples = steps * config.batch.global_batch_size
    warmup = round(config.optim.warmup_samples * samples / config.train.total_samples)
    return replace(run, overrides=(*run.overrides, f"train.total_samples={samples}", f"optim.warmup_samples={warmup}"))


def macs_of(config: RunConfig) -> int:
    return kind_of(config).training_macs(config) * config.train.total_samples


def compare(work: Path, runs: Sequence[Run], jobs: int) -> dict[str, Any]:
    """Train all; choose each kind's guidance on one seed of samples; score all its settings on another."""
    sweep = [Draw(CHOOSING, {"guidance_scale": scale}) for scale in GUIDANCE]
    swept = side_by_side(train_and_measure, [(work, run, sweep) for run in runs], jobs, "trained and swept")
    distances = {kind: [found for run, found in zip(runs, swept, strict=True) if run.variant == kind] for kind in KINDS}
    best = {kind: best_guidance(found) for kind, found in distances.items()}
    draws = [[Draw(SCORING, {"guidance_scale": best[run.variant]} | one) for one in STEPS[run.variant]] for run in runs]
    scored = side_by_side(measure, [(work, run, some) for run, some in zip(runs, draws, strict=True)], jobs, "scored")
    by_kind = {kind: [found for run, found in zip(runs, scored, strict=True) if run.variant == kind] for kind in KINDS}
    return {
        "guidance": {
            kind: {str(scale): spread([one[i] for one in found], distance_of) for i, scale in enumerate(GUIDANCE)}
            for kind, found in distances.items()
        },
        "kinds": {
            kind: [summary([one[i] for one in found], best[kind]) for i in range(len(STEPS[kind]))]
            for kind, found in by_kind.items()
        },
    }


def train_and_measure(work: Path, run: Run, draws: Sequence[Draw]) -> list[dict[str, Any]]:
    train(work, run)
    return measure(work, run, draws)


def best_guidance(found: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Of all seeds together: found[seed][i] are the scores at GUIDANCE[i]."""
    means = [statistics.mean(distance_of(one[i]) for one in found) for i in range(len(GUIDANCE))]
    return GUIDANCE[means.index(min(means))]


def distance_of(scores: dict[str, Any]) -> float:
    return scores["FD-digits"]


def spread(scores: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Over seeds: the mean and all the values."""
    values = [value(one) for one in scores]
    return {"mean": statistics.mean(values), "seeds": values}


def summary(scores: Sequence[dict[str, Any]], guidance_scale: float) -> dict[str, Any]:
    """One setting of one kind over its seeds."""
    first = scores[0]
    return {
        "draw": first["draw"],
        "guidance_scale": guidance_scale,
        **{key: first[key] for key in ("parameters", "training_macs", "samples_seen", "sampling_macs")},
        "FD-digits": spread(scores, distance_of),
        "ratio to floor": spread(scores, lambda one: one["ratio to floor"]),
        "class accuracy": spread(scores, lambda one: one["class accuracy"]),
        "neighbour ratio": spread(scores, lambda one: one["neighbour ratio"]),
        "neighbour ratio real heldout": first["neighbour ratio real heldout"],
        "class accuracy real heldout": first["class accuracy real heldout"],
        "FD-digits real-vs-real floor": first["FD-digits real-vs-real floor"],
        "FD-digits reconstructions": first["FD-digits reconstructions"],
        "loss": spread(scores, lambda one: one["loss"]),
        "band variance ratio": {
            band: spread(scores, lambda one, band=band: one["band variance ratio"][band])
            for band in first["band variance ratio"]
        },
    }


def table(result: dict[str, Any]) -> str:
    """One row a setting, in markdown."""
    first = result["kinds"]["ecar"][0]
    bands = list(first["band variance ratio"])
    lines = [
        "| kind | steps | guidance | MMAC a sample | FD-digits (seeds) | x floor | accuracy | neighbours | "
        + " | ".join(f"var {band}" for band in bands)
        + " |",
        "|---" * (8 + len(bands)) + "|",
    ]
    for kind, rows in result["kinds"].items():
        lines += [f"| {kind} | {row_of(row)} |" for row in rows]
    lines += [
        f"| real | | | | {first['FD-digits real-vs-real floor']:.1f} | 1.00 | "
        f"{first['class accuracy real heldout']:.3f} | {first['neighbour ratio real heldout']:.3f} |"
        + " 1 |"
        * len(bands),
        "",
        *(
            f"{kind}: {rows[0]['parameters'] / 1e6:.2f} M parameters, {rows[0]['samples_seen']:,} samples, "
            f"{rows[0]['training_macs'] / 1e12:.2f} TMAC of training"
            for kind, rows in result["kinds"].items()
        ),
    ]
    return "\n".join(lines)


def row_of(row: dict[str, Any]) -> str:
    words = ", ".join(f"{key} {value}" for key, value in row["draw"].items() if key != "guidance_scale")
    seeds = ", ".join(f"{value:.1f}" for value in row["FD-digits"]["seeds"])
    cells = [
        words.replace("steps_per_stage", "steps").replace("ar_steps", "AR steps"),
        f"{row['guidance_scale']:g}",
        f"{row['sampling_macs'] / 1e6:.0f}",
        f"{row['FD-digits']['mean']:.1f} ({seeds})",
        f"{row['ratio to floor']['mean']:.2f}",
        f"{row['class accuracy']['mean']:.3f}",
        f"{row['neighbour ratio']['mean']:.3f}",
        *(f"{band['mean']:.2f}" for band in row["band variance ratio"].values()),
    ]
    return " | ".join(cells)


def plot(result: dict[str, Any], path: Path) -> None:
    """FD-digits against MACs a sample: the mean over seeds, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, rows in result["kinds"].items():
        rows = sorted(rows, key=lambda row: row["sampling_macs"])
        seeds = [row["FD-digits"]["seeds"] for row in rows]
        mean = [row["FD-digits"]["mean"] for row in rows]
        around = [
            [at - min(some) for at, some in zip(mean, seeds, strict=True)],
            [max(some) - at for at, some in zip(mean, seeds, strict=True)],
        ]
        macs = [row["sampling_macs"] / 1e9 for row in rows]
        axes.errorbar(
            macs,
            mean,
            around,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{kind}, guidance {rows[0]['guidance_scale']:g}",
        )
    first = result["kinds"]["ecar"][0]
    axes.axhline(first["FD-digits reconstructions"], color="gray", linestyle=":", label="real, after the autoencoder")
    axes.axhline(first["FD-digits real-vs-real floor"], color="gray", linestyle="--", label="real (floor)")
    axes.set(xscale="log", yscale="log", xlabel="GMAC a sample, guidance included", ylabel="FD-digits, lower is better")
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.62))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
