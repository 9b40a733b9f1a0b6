"""Variants of ECAR at equal training compute on pixels of photographs: average velocities, and other choices.

`python benchmarks/variants.py few-calls` asks how good samples of few calls are. The runs of `decisive.py` with one
stage (`dit`) and three (`ecar`) continue: with velocities, or with average velocities, at equal compute. `from-scratch`
trains only the latter. `choices` changes one choice of ECAR at a time. Data, rules and `--share` are those of
`decisive.py`. Each continues where it was stopped. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decisive_rule as rule
import rounds
from decisive import KINDS, TRAINING_MACS
from digits import side_by_side
from pixels import (
    CONFIG,
    PixelRun,
    at_compute,
    choose,
    classifier,
    measured,
    pixel_parser,
    prepare,
    score,
    shifted_settings,
    train,
)

CONTINUED = 0.5  # training compute of a continued run, over that of the run it starts from
CONTINUED_RATE = "optim.learning_rate=7e-4"


@dataclass(frozen=True)
class Variant:
    """One row. changes: overrides. share: of the training compute. continues: whether it starts from its kind's run."""

    kind: str
    steps: tuple[dict[str, Any], ...]
    changes: tuple[str, ...] = ()
    share: float = 1.0
    continues: bool = False

    @property
    def typical(self) -> dict[str, Any]:
        """The number of steps at which the guidance is chosen: the second to last."""
        return self.steps[-2]

    def run(self, name: str, seed: int, data: str) -> PixelRun:
        return PixelRun(name, seed, CONFIG, self.changes, data=data, model=KINDS[self.kind])


def settings(*pairs: tuple[str, tuple[int, ...]]) -> tuple[dict[str, Any], ...]:
    return tuple({"solver": solver, "steps_per_stage": list(steps)} for solver, steps in pairs)


# Settings with one, three, six and 48 calls; three stages need at least three.
VELOCITY = {
    "dit": settings(("euler", (1,)), ("euler", (3,)), ("midpoint", (3,)), ("midpoint", (24,))),
    "ecar": settings(("euler", (1, 1, 1)), ("midpoint", (1, 1, 1)), ("midpoint", (8, 8, 8))),
}
AVERAGE = {
    "dit": settings(("mean", (1,)), ("mean", (3,)), ("mean", (6,)), ("midpoint", (24,))),
    "ecar": settings(("mean", (1, 1, 1)), ("mean", (2, 2, 2)), ("midpoint", (8, 8, 8))),
}
MEAN = "flow.objective=mean_velocity"


def few_calls() -> dict[str, Variant]:
    """A velocity network continues as it is, or learns average velocities, for the same compute."""
    rows = {}
    for kind in ("ecar", "dit"):
        rows[f"{kind}-velocity"] = Variant(kind, VELOCITY[kind], (CONTINUED_RATE,), CONTINUED, continues=True)
        changes = (MEAN, "flow.instant_share=0.25", "flow.whole_share=0.25", CONTINUED_RATE)
        rows[f"{kind}-average"] = Variant(kind, AVERAGE[kind], changes, CONTINUED, continues=True)
    return rows


def from_scratch() -> dict[str, Variant]:
    """Average velocities from the first step, for as long as a run and its continuation together."""
    return {
        f"{kind}-average-from-scratch": Variant(kind, AVERAGE[kind], (MEAN,), 1.0 + CONTINUED)
        for kind in ("ecar", "dit")
    }


CHOICE_STEPS = settings(("midpoint", (1, 1, 1)), ("midpoint", (1, 2, 1)), ("midpoint", (2, 2, 2)))
CHOICES: dict[str, tuple[str, ...]] = {  # the first is the run of decisive.py
    "ecar": (),
    "ar1-flow5": ("model.ar_depth=1", "model.flow_depth=5"),
    "ar2-flow4": ("model.ar_depth=2", "model.flow_depth=4"),
    "weights-1-over-L": ("flow.stage_weights=[16,4,1]",),
    "weights-1-2-4": ("flow.stage_weights=[1,2,4]",),
    "tau-0.1": ("flow.context.tau=0.1",),
    "tau-1": ("flow.context.tau=1",),
    "class-only": ("flow.context.mode=class_only",),
    "ends-.5-.75-1": ("flow.ends=[0.5,0.75,1]",),
    "ends-.2-.5-1": ("flow.ends=[0.2,0.5,1]",),
    "logit-normal": ("flow.times=logit_normal",),
}


def choices() -> dict[str, Variant]:
    return {name: Variant("ecar", CHOICE_STEPS, changes) for name, changes in CHOICES.items()}


GROUPS = {"few-calls": few_calls, "from-scratch": from_scratch, "choices": choices}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    prepare(work, options.data)
    classifier(work, options.data)

    # Train, beginning with the runs that others start from.
    variants = GROUPS[options.group]()
    variants = {name: variants[name] for name in options.rows or variants}
    budget = TRAINING_MACS * options.share
    bases = {
        (kind, seed): at_compute(work, Variant(kind, ()).run(kind, seed, options.data), budget)
        for seed in range(options.seeds)
        for kind in {one.kind for one in variants.values() if one.continues}
    }
    side_by_side(train, [(work, run) for run in bases.values()], options.jobs, "trained, to start from")
    runs = []
    for seed in range(options.seeds):
        for name, variant in variants.items():
            run = at_compute(work, variant.run(name, seed, options.data), budget * variant.share)
            if variant.continues:
                run = started_from(work, run, bases[variant.kind, seed])
            runs.append(run)
    side_by_side(train, [(work, run) for run in runs], options.jobs, "trained")

    # Choose guidance and shifts on one half of the held-out pictures, score on the other.
    typical = {name: variant.typical for name, variant in variants.items()}
    steps = {name: variant.steps for name, variant in variants.items()}
    chosen = choose(work, runs, typical, steps, options.choosing_samples, options.jobs)
    drawn = {name: shifted_settings(steps[name], best) for name, best in chosen.items()}
    rows = score(work, runs, drawn, options.samples, options.jobs)

    print(rule.table(rows))
    rounds.publish({"group": options.group, "chosen": chosen, **measured(work, options, rows)}, options.save)


def started_from(work: Path, run: PixelRun, base: PixelRun) -> PixelRun:
    """The run with the final EMA weights of `base` as its initial weights."""
    folder = base.load(work).run_directory
    return replace(run, overrides=(*run.overrides, f"train.init_from={folder}"))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = pixel_parser(__doc__)
    options.add_argument("group", choices=GROUPS, help="group of rows")
    options.add_argument("--rows", nargs="+", help="names of rows of the group (default: all)")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
