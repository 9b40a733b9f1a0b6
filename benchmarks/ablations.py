"""Ablations of ECAR on digits and in closed form: each expected sign, and whether it was found.

`python benchmarks/ablations.py` takes about an hour on two cores and continues where it was stopped; `--share 0.01
--seeds 1` is a trial run of some minutes. It uses the data and the full-length runs that benchmarks/quality.py has left
in the same folder. The last line is JSON. See benchmarks/README.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import closed_form
import rounds
from ablation_report import plot, report
from digits import DEVICE, IMAGE_SIZE, Draw, Run, is_trained, measure, parser, prepare, side_by_side
from quality import ECAR, SCORING, at_equal_compute, macs_of, spread, summary, train_and_measure

from ecar_dist.config.run import RunConfig
from ecar_dist.evaluate.bands import band_variances
from ecar_dist.evaluate.images import read_images
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.run.directory import RunDirectory

GUIDANCE = 1.0  # none: it trades variance for distance, and variance is what is measured
VARIANTS: dict[str, tuple[str, ...]] = {
    "noisy states": ("flow.context.mode=noisy_state", "flow.context.tau=0.3"),
    "exact states": ("flow.context.mode=noisy_state", "flow.context.tau=0", "flow.context.allow_unsafe=true"),
    "class only": ("flow.context.mode=class_only",),
    "two stages": ("flow.num_stages=2",),
    "one stage": ("flow.num_stages=1",),
}
REFERENCE = "noisy states"  # and three stages
CALLS = {"euler": (2, 4, 8, 16, 32), "heun": (2, 4, 8, 16), "midpoint": (2, 4, 8, 16)}
TAUS = (0.1, 0.3, 1.0)
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    asking = parser(__doc__, seeds=2)
    asking.add_argument("--trap-plot", type=Path, help="also plot the trap of docs/ecar.md, closed form, to this file")
    options = asking.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    if options.trap_plot:
        closed_form.trap_picture(options.trap_plot)
    prepare(work)
    variants = runs_at_equal_compute(work, options.seeds, options.share)
    result: dict[str, Any] = {
        "variants": compare(work, variants, options.jobs),
        "solvers": solvers(work, variants[REFERENCE], options.jobs),
        "closed form solvers": [
            closed_form.errors("all", closed_form.TAU, solver, calls)
            for solver, some in CALLS.items()
            for calls in some
        ],
        "closed form tau": [closed_form.tau_row(tau) for tau in TAUS],
    }
    result["signs"] = context_signs(result["variants"]) + solver_signs(result)
    print(report(result))
    if options.plot:
        plot(result, options.plot)
    rounds.publish(result | {"hardware": options.hardware or rounds.hardware()}, options.save)


def runs_at_equal_compute(work: Path, seeds: int, share: float) -> dict[str, list[Run]]:
    """The runs of every variant, one per seed; a run's name contains its share, so each share is a separate run.

    The reference at the config's full length is quality.py's own `ecar`, which may already be trained.
    """
    full = macs_of(Run("ecar", 0, ECAR).load(work))
    names = {name: f"{name.replace(' ', '-')}-x{share:g}" for name in VARIANTS}
    if share == 1:
        names[REFERENCE] = "ecar"
    return {
        name: [at_equal_compute(work, Run(names[name], seed, ECAR, changes), full, share) for seed in range(seeds)]
        for name, changes in VARIANTS.items()
    }


def compare(work: Path, variants: dict[str, list[Run]], jobs: int) -> dict[str, Row]:
    """Train all, seed by seed, and score each at the sampling MACs of the reference with its config's own steps."""
    reference = variants[REFERENCE][0].load(work)
    macs = kind_of(reference).sampling_macs(unguided({}).of(reference))
    draws = {name: matched_draw(runs[0].load(work), macs) for name, runs in variants.items()}
    by_seed = zip(*variants.values(), strict=True)
    items = [item for runs in by_seed for item in zip(variants, runs, strict=True)]
    found = side_by_side(train_and_measure, [(work, run, [draws[name]]) for name, run in items], jobs, "trained")
    scores = {name: [one for (of, _), (one,) in zip(items, found, strict=True) if of == name] for name in variants}
    return {name: summary(rows, GUIDANCE) for name, rows in scores.items()}


def unguided(changes: Row) -> Draw:
    return Draw(SCORING[0], {"guidance_scale": GUIDANCE} | changes)


def matched_draw(config: RunConfig, macs: float) -> Draw:
    """The number of solver steps per stage that comes closest to `macs` per sample."""
    draws = [unguided({"steps_per_stage": steps}) for steps in range(1, 65)]
    return min(draws, key=lambda draw: abs(kind_of(config).sampling_macs(draw.of(config)) - macs))


def solvers(work: Path, own: Sequence[Run], jobs: int) -> dict[str, Any]:
    """Scores of the trained reference by solver and calls per stage, and the names of its runs."""
    full = [Run("ecar", run.seed, ECAR) for run in own]
    runs = full if all(stands_in_full(work, run) for run in full) else own
    draws = [
        unguided({"solver": solver, "steps_per_stage": calls // SOLVERS[solver].calls_per_step})
        for solver, some in CALLS.items()
        for calls in some
    ]
    found = side_by_side(measure, [(work, run, draws) for run in runs], jobs, "scored by solver")
    real = real_variances(work)
    rows = []
    for i, draw in enumerate(draws):
        scores = [one[i] for one in found]
        calls = draw.changes["steps_per_stage"] * SOLVERS[draw.changes["solver"]].calls_per_step
        share = spread(scores, lambda one: variance_share(one["band variance ratio"], real))
        row = {"solver": draw.changes["solver"], "calls": calls, "variance share": share}
        rows.append(summary(scores, GUIDANCE) | row)
    return {"runs": [run.name for run in runs], "rows": rows}


def stands_in_full(work: Path, run: Run) -> bool:
    """Whether the run exists and has the full length of its config: quality.py may have made a shorter one."""
    config = run.load(work)
    stored = RunDirectory(config.run_directory)
    return is_trained(work, run) and stored.load_config().train.total_samples == config.train.total_samples


def real_variances(work: Path) -> dict[str, float]:
    """Variance of the held-out images by band: the denominators of the ratios in the scores."""
    return band_variances(read_images(str(work / "images/heldout"), IMAGE_SIZE)[0].pixels, DEVICE)


def variance_share(ratios: dict[str, float], real: dict[str, float]) -> float:
    """Total variance of samples over that of real images, from the ratios of the bands."""
    return sum(ratios[band] * real[band] for band in real) / sum(real.values())


def sign(expected: str, smaller: Sequence[float], larger: Sequence[float]) -> Row:
    """Whether smaller < larger, in the mean over seeds; and in how many of the seeds."""
    return {
        "expected": expected,
        "smaller": list(smaller),
        "larger": list(larger),
        "found": statistics.mean(smaller) < statistics.mean(larger),
        "seeds": sum(a < b for a, b in zip(smaller, larger, strict=True)),
    }


def context_signs(variants: dict[str, Row]) -> list[Row]:
    """The signs that the trap, the use of a context, and the claim about stages predict for the variants."""
    noisy, exact, label = (variants[name] for name in (REFERENCE, "exact states", "class only"))
    coarse = list(noisy["band variance ratio"])[-2:]

    def seeds(row: Row, key: str) -> list[float]:
        return row[key]["seeds"]

    return [
        sign("loss: exact states < noisy states", seeds(exact, "loss"), seeds(noisy, "loss")),
        *(
            sign(
                f"variance of the {band} band: exact states < noisy states",
                seeds(exact["band variance ratio"], band),
                seeds(noisy["band variance ratio"], band),
            )
            for band in reversed(coarse)
        ),
        sign("FD-digits: noisy states < exact states", seeds(noisy, "FD-digits"), seeds(exact, "FD-digits")),
        sign("loss: noisy states < class only", seeds(noisy, "loss"), seeds(label, "loss")),
        sign("FD-digits: noisy states < class only", seeds(noisy, "FD-digits"), seeds(label, "FD-digits")),
        *(
            sign(f"FD-digits: {name} < one stage", seeds(row, "FD-digits"), seeds(variants["one stage"], "FD-digits"))
            for name, row in {"three stages": noisy, "two stages": variants["two stages"]}.items()
        ),
    ]


def solver_signs(result: dict[str, Any]) -> list[Row]:
    """More calls are better, and second order is at least as good as Euler at equal calls; trained and closed form."""
    trained = {(row["solver"], row["calls"]): row for row in result["solvers"]["rows"]}
    exact = {(row["solver"], row["calls"]): row["covariance error"] for row in result["closed form solvers"]}
    limit = trained["midpoint", 16]["variance share"]["seeds"]

    def off(solver: str, calls: int) -> list[float]:
        """How far the variance is from its limit."""
        shares = trained[solver, calls]["variance share"]["seeds"]
        return [abs(share - end) for share, end in zip(shares, limit, strict=True)]

    signs = []
    for solver, some in CALLS.items():
        few, many = (trained[solver, calls]["FD-digits"]["seeds"] for calls in (some[0], some[-1]))
        signs.append(sign(f"FD-digits, {solver}: {some[-1]} calls < {some[0]} calls", many, few))
        few, many = ([exact[solver, calls]] for calls in (some[0], some[-1]))
        signs.append(sign(f"closed form error, {solver}: {some[-1]} calls < {some[0]} calls", many, few))
    for solver in ("heun", "midpoint"):
        for calls in CALLS[solver][:-1]:
            words = f"variance off its end, {calls} calls: {solver} < euler"
            signs.append(sign(words, off(solver, calls), off("euler", calls)))
        signs += [
            sign(f"closed form error, {calls} calls: {solver} < euler", [exact[solver, calls]], [exact["euler", calls]])
            for calls in CALLS[solver]
        ]
    return signs


if __name__ == "__main__":
    main()
