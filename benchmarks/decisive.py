"""Do stages pay off on data that needs many solver steps? `ecar`, `pyramid` and `dit` at equal training compute.

`python benchmarks/decisive.py` takes one to two hours on two idle cores, and continues where it was stopped; `--share`
makes the trainings shorter, `--full` is the long form for a GPU. The rule that decides was fixed before the first run:
docs/claim.md, "The decisive experiment". The last line is JSON.

Every kind chooses its guidance and its time shift on one half of the held-out images, and is scored on the other, over
several sampling seeds and trainings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import decisive_rule as rule
import numpy as np
import rounds
from digits import side_by_side
from pixels import (
    CONFIG,
    PixelRun,
    at_compute,
    choose,
    classifier,
    floor,
    measured,
    pictures,
    pixel_parser,
    prepare,
    score,
    shifted_settings,
    train,
)
from scipy.sparse.linalg import svds

from ecar_dist.data.shards.manifest import load_manifest

KINDS: dict[str, tuple[str, ...]] = {  # with about equal numbers of parameters
    "ecar": ("model.kind=ecar",),
    "pyramid": ("model.kind=pyramid", "model.flow_depth=6"),
    "dit": ("model.kind=dit", "model.flow_depth=6", "flow.num_stages=1"),
}
TRAINING_MACS = 6e12  # of each run
FULL_MACS = 60e12

# Solver steps of each stage, by number of stages. Midpoint calls the network twice a step, euler once.
STEPS: dict[int, tuple[dict[str, Any], ...]] = {
    1: (
        {"solver": "euler", "steps_per_stage": [1]},
        *({"steps_per_stage": [steps]} for steps in (1, 2, 3, 4, 6, 8, 16)),
    ),
    3: (
        {"solver": "euler", "steps_per_stage": [1, 1, 1]},
        *({"steps_per_stage": list(steps)} for steps in ((1, 1, 1), (2, 2, 2), (4, 2, 1), (6, 4, 2), (8, 8, 8))),
    ),
}
TYPICAL = {1: {"steps_per_stage": [8]}, 3: {"steps_per_stage": [2, 2, 2]}}  # at which the guidance is chosen


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    prepare(work, options.data)

    # On a set without large eigenvalues, every model needs few calls, so the set decides nothing.
    spectrum = spectrum_of(work, options.data)
    print(f"largest eigenvalue within a class: {spectrum['largest_within_class']:.1f}")
    if spectrum["largest_within_class"] < rule.SMALLEST_EIGENVALUE and not options.any_spectrum:
        raise SystemExit(f"below {rule.SMALLEST_EIGENVALUE}: this set cannot decide; --any-spectrum runs it anyway")

    # Train, choose, score, and apply the rule.
    classifier(work, options.data)
    budget = (FULL_MACS if options.full else TRAINING_MACS) * options.share
    runs = runs_at_equal_compute(work, options.data, options.seeds, budget)
    side_by_side(train, [(work, run) for run in runs], options.jobs, "trained")
    typical = {kind: TYPICAL[stages(kind)] for kind in KINDS}
    steps = {kind: STEPS[stages(kind)] for kind in KINDS}
    chosen = choose(work, runs, typical, steps, options.choosing_samples, options.jobs)
    settings = {kind: chosen_settings(kind, best) for kind, best in chosen.items()}
    rows = score(work, runs, settings, options.samples, options.jobs)
    verdict = rule.decide(rows)

    # Guidance doubles the cost of a call, but is chosen for quality alone: score without it too, outside of the rule.
    unguided = {kind: unguided_settings(kind, best) for kind, best in chosen.items()}
    unguided_runs = [run for run in runs if unguided[run.variant]]
    unguided_rows = score(work, unguided_runs, unguided, options.samples, options.jobs)

    print(rule.table(rows))
    print("\n".join(verdict["lines"]))
    print(rule.table(unguided_rows))
    if options.plot:
        rule.plot(rows, floor(work, options.data, options.samples)["mean"], options.plot)
    result = {
        "verdict": verdict,
        "training images": load_manifest(str(work / options.data / "latents")).count,
        "spectrum": spectrum,
        "chosen": chosen,
        "rows without guidance": unguided_rows,
        **measured(work, options, rows),
    }
    rounds.publish(result, options.save)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = pixel_parser(__doc__)
    options.add_argument("--full", action="store_true", help="ten times the training; for a GPU")
    options.add_argument("--any-spectrum", action="store_true", help="run even if the set needs few calls")
    return options.parse_args(arguments)


def spectrum_of(work: Path, data: str) -> dict[str, float]:
    """The largest eigenvalue of the covariance of the latents at unit variance, overall and within a class."""
    images, _ = pictures(work, data, "train")
    values = images.pixels.reshape(len(images.labels), -1).astype(np.float32)
    values = (values - values.mean()) / values.std()

    # Within a class: around the mean of the class.
    within = values.copy()
    for label in np.unique(images.labels):
        within[images.labels == label] -= within[images.labels == label].mean(0)
    return {
        "largest": largest_eigenvalue(values - values.mean(0)),
        "largest_within_class": largest_eigenvalue(within),
    }


def largest_eigenvalue(centred: np.ndarray) -> float:
    """The largest eigenvalue of the covariance of centred values [N, d]."""
    (singular_value,) = svds(centred, k=1, return_singular_vectors=False, random_state=0)
    return float(singular_value**2 / len(centred))


def runs_at_equal_compute(work: Path, data: str, seeds: int, budget: float) -> list[PixelRun]:
    """Every seed and kind; each sees as many samples, in whole steps, as the budget in MACs allows."""
    runs = [PixelRun(kind, seed, CONFIG, data=data, model=KINDS[kind]) for seed, kind in product(range(seeds), KINDS)]
    return [at_compute(work, run, budget) for run in runs]


def stages(kind: str) -> int:
    return 1 if kind == "dit" else 3


def chosen_settings(kind: str, best: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(time grid, setting) for each number of steps: `shifted` by the best shift; for `dit` also `uniform`.

    The rule asks how many calls `dit` needs on a uniform grid.
    """
    steps = STEPS[stages(kind)]
    uniform = [("uniform", one | best["guidance"] | {"time_shift": 1.0}) for one in steps]
    return shifted_settings(steps, best) + (uniform if kind == "dit" else [])


def unguided_settings(kind: str, best: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The shifted settings of a kind without its guidance; none if it has chosen no guidance."""
    if best["guidance"]["guidance_scale"] == 1.0:
        return []
    return shifted_settings(STEPS[stages(kind)], best | {"guidance": {"guidance_scale": 1.0}})


if __name__ == "__main__":
    main()
