"""Quality against sampling compute: ECAR and its relatives on digits, at equal parameters and equal training MACs.

`python benchmarks/quality.py` compares the kinds of the claim in one to two hours on two cores; `--kinds` selects
others. It continues where it was stopped; `--share 0.02` is a trial run of some minutes. The last line is JSON. See
benchmarks/README.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rounds
from digits import ROOT, Draw, Run, call, measure, parser, prepare, score_of_codes, side_by_side, train
from speed import LATENCY, THROUGHPUT, speeds

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of

GUIDANCE = (1.0, 1.15, 1.3, 1.6, 2.0)
CHOOSING, SCORING = 0, (1, 2, 3)  # seeds of the samples by which the guidance is chosen, and of those that are reported
SCORES = ("FD-digits", "ratio to floor", "class accuracy", "neighbour ratio")
OF_SAMPLES = "FD-digits of each sampling seed"
CODES, PATCH = 512, 2  # of kinds over codes: with this many, they have about as many parameters as the others


@dataclass(frozen=True)
class Contender:
    """One row of the comparison: how a kind is trained, and with which settings it is sampled, cheap ones first.

    typical: index of the setting at which the guidance is chosen.
    """

    config: Path
    draws: tuple[dict[str, Any], ...]
    overrides: tuple[str, ...] = ()
    typical: int = 0

    def run(self, variant: str, seed: int) -> Run:
        return Run(variant, seed, self.config, self.overrides)


def over_codes(kind: str, *overrides: str) -> tuple[str, ...]:
    return f"model.kind={kind}", f"model.codebook_size={CODES}", *overrides


ECAR, PYRAMID, DIT, MAR = (ROOT / f"configs/digits_{name}.yaml" for name in ("cpu", "pyramid", "dit", "mar"))
STAGED = tuple({"steps_per_stage": steps} for steps in (1, 2, 4, 8))
DEEPER = "model.ar_depth=8"  # one more block, because `par` has no head
CLAIMED = ("ecar", "pyramid", "dit", "mar")  # those that docs/claim.md compares
KINDS = {
    "ecar": Contender(ECAR, STAGED, typical=1),
    "pyramid": Contender(PYRAMID, STAGED, typical=1),
    "dit": Contender(DIT, (*STAGED, {"solver": "euler", "steps_per_stage": 50}), typical=1),
    "mar": Contender(
        MAR,
        tuple({"ar_steps": steps, "steps_per_stage": inner} for steps, inner in ((2, 4), (4, 8), (8, 8), (16, 8))),
        typical=1,
    ),
    "par1": Contender(MAR, ({"temperature": 1.0}, {"temperature": 0.8}), over_codes("par", "par.group=1", DEEPER)),
    "par4": Contender(MAR, ({"temperature": 1.0}, {"temperature": 0.8}), over_codes("par", "par.group=4", DEEPER)),
    "par_cont4": Contender(MAR, STAGED[2:], ("model.kind=par_cont", "par.group=4")),
    "hybrid": Contender(
        MAR, ({"code_steps": 4}, {"code_steps": 12}, {"code_steps": 12, "residuals": False}), over_codes("hybrid")
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser(__doc__, seeds=3)
    given.add_argument("--kinds", nargs="+", choices=KINDS, default=CLAIMED, help="rows of the table of contenders")
    given.add_argument("--settings", type=int, help="settings of each kind, cheap ones first (default: all)")
    options = given.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    prepare(work)
    runs = runs_at_equal_compute(work, options.seeds, options.share, options.kinds)
    uses_codes = any(kind_of(run.load(work)).needs_codebook for run in runs)
    if uses_codes:
        fit_codes(work)
    result = compare(work, runs, options.jobs, options.settings)
    if uses_codes:
        result["FD-digits of codes"] = distance_of(score_of_codes(work, CODES, PATCH))
    print(table(result))
    if options.plot:
        plot(result, options.plot)
    rounds.publish(result | {"hardware": options.hardware or rounds.hardware()}, options.save)


def fit_codes(work: Path) -> None:
    """Fit the codebook next to the latents, which stay the same set. An existing one is kept."""
    if not (work / f"latents/codebook-p{PATCH}-v{CODES}.safetensors").exists():
        words = ["fit-codebook", str(work / "latents"), "--size", str(CODES), "--patch-size", str(PATCH)]
        call(["-m", "data_tools", *words], threads=2)


def runs_at_equal_compute(work: Path, seeds: int, share: float, kinds: Sequence[str] = CLAIMED) -> list[Run]:
    """Every kind and seed, seed by seed; each sees as many samples as ECAR's training MACs allow."""
    full = macs_of(KINDS["ecar"].run("ecar", 0).load(work))
    return [at_equal_compute(work, KINDS[kind].run(kind, seed), full, share) for seed in range(seeds) for kind in kinds]


def at_equal_compute(work: Path, run: Run, full: float, share: float) -> Run:
    """The run with as many samples, in whole steps, as `share` of the `full` MACs allows.

    Its warm-up is in proportion to the samples, its EMA to the share: a long one would still average early weights.
    """
    config = run.load(work)
    steps = round(full * share / kind_of(config).training_macs(config) / config.batch.global_batch_size)
    samples = steps * config.batch.global_batch_size
    lengths = {
        "train.total_samples": samples,
        "optim.warmup_samples": round(config.optim.warmup_samples * samples / config.train.total_samples),
        "ema.half_life_samples": [round(one * share) for one in config.ema.half_life_samples],
    }
    return replace(run, overrides=(*run.overrides, *(f"{key}={value}" for key, value in lengths.items())))


def macs_of(config: RunConfig) -> int:
    return kind_of(config).training_macs(config) * config.train.total_samples


def compare(work: Path, runs: Sequence[Run], jobs: int, settings: int | None) -> dict[str, Any]:
    """Train all; choose each kind's guidance on one set of samples; score its first settings on others."""
    kinds = list(dict.fromkeys(run.variant for run in runs))

    def by_kind(found: Sequence[Any]) -> dict[str, list[Any]]:
        return {kind: [one for run, one in zip(runs, found, strict=True) if run.variant == kind] for kind in kinds}

    # The guidance of each kind, at its typical setting.
    to_train = [(work, run, guidance_sweep(KINDS[run.variant])) for run in runs]
    swept = by_kind(side_by_side(train_and_measure, to_train, jobs, "trained and swept"))
    best = {kind: best_guidance(found) for kind, found in swept.items()}

    # The scores of its settings with that guidance.
    guided = {kind: {"guidance_scale": scale} for kind, scale in best.items()}
    draws = {kind: [guided[kind] | one for one in KINDS[kind].draws[:settings]] for kind in kinds}
    to_score = [(work, run, draws[run.variant]) for run in runs]
    scored = by_kind(side_by_side(measure_often, to_score, jobs, "scored"))

    # Speed does not depend on the seed of the training. Nothing else runs at the same time.
    first = {run.variant: run for run in reversed(runs)}
    rows = [(kind, number) for kind in kinds for number in range(len(draws[kind]))]
    drawn = [(first[kind], Draw(SCORING[0], draws[kind][i])) for kind, i in rows]
    timed = dict(zip(rows, speeds(work, drawn), strict=True))
    return {
        "guidance": {
            kind: {str(scale): spread([one[i] for one in found], distance_of) for i, scale in enumerate(GUIDANCE)}
            for kind, found in swept.items()
        },
        "kinds": {
            kind: [summary([one[i] for one in found], best[kind]) | timed[kind, i] for i in range(len(draws[kind]))]
            for kind, found in scored.items()
        },
    }


def guidance_sweep(contender: Contender) -> list[Draw]:
    typical = contender.draws[contender.typical]
    return [Draw(CHOOSING, typical | {"guidance_scale": scale}) for scale in GUIDANCE]


def train_and_measure(work: Path, run: Run, draws: Sequence[Draw]) -> list[dict[str, Any]]:
    train(work, run)
    return measure(work, run, draws)


def measure_often(work: Path, run: Run, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores of each setting: means over the seeds of the samples, with the distance of each."""
    draws = [[Draw(seed, setting) for seed in SCORING] for setting in settings]
    scores = iter(measure(work, run, [draw for some in draws for draw in some]))
    return [mean_over_samples([next(scores) for _ in some]) for some in draws]


def mean_over_samples(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of one training and setting. Values that do not depend on the samples are those of the first set."""
    bands = scores[0]["band variance ratio"]
    return {
        **scores[0],
        **{key: statistics.mean(one[key] for one in scores) for key in SCORES},
        "band variance ratio": {
            band: statistics.mean(one["band variance ratio"][band] for one in scores) for band in bands
        },
        OF_SAMPLES: [distance_of(one) for one in scores],
    }


def best_guidance(found: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The best over all seeds together: found[seed][i] are the scores at GUIDANCE[i]."""
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
        **{key: first[key] for key in ("parameters", "training_macs", "samples_seen", "sampling_macs", "serial_calls")},
        **{name: spread(scores, lambda one, name=name: one[name]) for name in SCORES},
        **({OF_SAMPLES: [one[OF_SAMPLES] for one in scores]} if OF_SAMPLES in first else {}),
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
    """One row per setting, in Markdown."""
    first = next(iter(result["kinds"].values()))[0]
    bands = list(first["band variance ratio"])
    lines = [
        "| kind | steps | guidance | calls | MMAC a sample | ms at batch 1 | images/s | FD-digits (trainings) "
        "| sd over samplings | x floor | accuracy | neighbours | " + " | ".join(f"var {band}" for band in bands) + " |",
        "|---" * (12 + len(bands)) + "|",
    ]
    for kind, rows in result["kinds"].items():
        lines += [f"| {kind} | {row_of(row)} |" for row in rows]
    lines += [
        f"| real | | | | | | | {first['FD-digits real-vs-real floor']:.1f} | | 1.00 | "
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
    if (of_codes := result.get("FD-digits of codes")) is not None:
        lines.append(f"real images from their nearest codes: FD-digits {of_codes:.1f}")
    return "\n".join(lines)


def row_of(row: dict[str, Any]) -> str:
    words = ", ".join(f"{key} {value}" for key, value in row["draw"].items() if key != "guidance_scale")
    seeds = ", ".join(f"{value:.1f}" for value in row["FD-digits"]["seeds"])
    within = statistics.mean(statistics.stdev(some) for some in row[OF_SAMPLES])
    cells = [
        words.replace("steps_per_stage", "steps").replace("ar_steps", "AR steps"),
        f"{row['guidance_scale']:g}",
        str(row["serial_calls"]),
        f"{row['sampling_macs'] / 1e6:.0f}",
        f"{1e3 * row[LATENCY]:.1f}",
        f"{row[THROUGHPUT]:.0f}",
        f"{row['FD-digits']['mean']:.1f} ({seeds})",
        f"{within:.1f}",
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
    first = next(iter(result["kinds"].values()))[0]
    axes.axhline(first["FD-digits reconstructions"], color="gray", linestyle=":", label="real, after the autoencoder")
    axes.axhline(first["FD-digits real-vs-real floor"], color="gray", linestyle="--", label="real (floor)")
    axes.set(xscale="log", yscale="log", xlabel="GMAC a sample, guidance included", ylabel="FD-digits, lower is better")
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.62))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
