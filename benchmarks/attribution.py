"""Which stage costs quality? Samples whose first stages are those of real images; the model draws the others.

`python benchmarks/attribution.py` scores the runs of `decisive.py`; give it the same `--share`, `--seeds` and `--work`.
With no stage given, samples are the model's own; with all given, they are training images. What the distance falls by
from one row to the next is the share of the stage that is no longer drawn. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import rounds
import torch
from decisive import TRAINING_MACS, runs_at_equal_compute
from digits import DEVICE, Draw, is_trained, side_by_side
from pixels import BATCH_SIZE, SCORING, PixelRun, floor, labels_of, pixel_parser, scores_of

from data_tools.spectrum.report import read_latents
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.flow.path import stage_endpoints
from ecar_dist.flow.pyramid import latent_pyramid, noise_pyramid
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.sample.load import open_trained
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.sample.staged import draw_stages
from ecar_dist.vae.pixels import to_pixels

KINDS = ("ecar", "pyramid")
NUM_STAGES = 3
SETTING = {"solver": "midpoint", "steps_per_stage": [4, 4, 4], "guidance_scale": 1.0, "time_shift": 1.0}


def main(arguments: Sequence[str] | None = None) -> None:
    options = pixel_parser(__doc__).parse_args(arguments)
    work = options.work.resolve()
    runs = runs_at_equal_compute(work, options.data, options.seeds, TRAINING_MACS * options.share)
    runs = [run for run in runs if run.variant in KINDS]
    if missing := [run.name for run in runs if not is_trained(work, run)]:
        raise SystemExit(f"{', '.join(missing)}: not trained yet; run decisive.py with these options first")

    measured = side_by_side(measure, [(work, run, options.samples) for run in runs], options.jobs, "scored")
    rows = [row for kind in KINDS for row in rows_of(kind, runs, measured)]
    print(table(rows))
    result = {
        "data": options.data,
        "floor": floor(work, options.data, options.samples),
        "setting": SETTING,
        "rows": rows,
        "samples": options.samples,
        "hardware": options.hardware or rounds.hardware(),
    }
    rounds.publish(result, options.save)


def measure(work: Path, run: PixelRun, samples: int) -> list[list[dict[str, Any]]]:
    """Scores by number of given stages, one for each sampling seed. Kept in the run directory."""
    file = run.load(work).run_directory / f"attribution-{samples}.json"
    if not file.exists():
        scores = [[score(work, run, given, seed, samples) for seed in SCORING] for given in range(NUM_STAGES + 1)]
        file.write_text(json.dumps(scores))
    return json.loads(file.read_text())


def score(work: Path, run: PixelRun, given: int, seed: int, samples: int) -> dict[str, Any]:
    """The scores of one set of samples whose first `given` stages are those of training images."""
    trained = open_trained(run.load(work).run_directory, DEVICE)
    plan = SamplingPlan.from_config(Draw(seed, SETTING).of(trained.config), DEVICE)
    labels = labels_of(work, run.data, samples)
    real = real_ends(plan.schedule, latents_of(work, run.data, labels, seed), seed)[:given]

    pixels = []
    for chunk in torch.arange(samples).split(BATCH_SIZE):
        given_ends = [end[chunk] for end in real]
        stages = draw_stages(trained.model, plan, torch.from_numpy(labels)[chunk], chunk, seed, given_ends)
        pixels.append(to_pixels(trained.codec.decode(stages[-1])))
    return scores_of(work, run.data, np.concatenate(pixels), labels)


def real_ends(schedule: StageSchedule, latents: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """X^e_k of latents [N, C, H, W], as in training: K of [N, C, h_k, w_k]."""
    generator = torch.Generator().manual_seed(seed)
    pyramid = latent_pyramid(latents, schedule.num_stages, schedule.factor)
    white = [torch.randn(level.shape, generator=generator) for level in pyramid]
    return [end for _, end in stage_endpoints(schedule, pyramid, noise_pyramid(white, schedule))]


def latents_of(work: Path, data: str, labels: np.ndarray, seed: int) -> torch.Tensor:
    """For each label, the latent of a random training image of the class."""
    latents, classes = all_latents(work / data / "latents")
    generator = np.random.default_rng(seed)
    return torch.from_numpy(latents[[generator.choice(np.flatnonzero(classes == label)) for label in labels]])


@cache
def all_latents(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    manifest = load_manifest(str(folder))
    return read_latents(folder, manifest, manifest.count)


def rows_of(kind: str, runs: Sequence[PixelRun], measured: Sequence[Any]) -> list[dict[str, Any]]:
    """A row for each number of given stages: distance to the second half of the held-out images, with both spreads."""
    of_kind = [scores for run, scores in zip(runs, measured, strict=True) if run.variant == kind]
    rows = []
    for given in range(NUM_STAGES + 1):
        distances = [[one["FD"][1] for one in scores[given]] for scores in of_kind]
        means = [statistics.mean(seeds) for seeds in distances]
        rows.append(
            {
                "kind": kind,
                "given": given,
                "FD": statistics.mean(means),
                "sd over trainings": statistics.stdev(means) if len(means) > 1 else None,
                "sd over samplings": statistics.mean(statistics.stdev(seeds) for seeds in distances),
                "accuracy": statistics.mean(one["accuracy"] for scores in of_kind for one in scores[given]),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| kind | stages given | FD | sd over trainings | sd over samplings | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = row["sd over trainings"]
        of_trainings = "" if spread is None else f"{spread:.0f}"
        lines.append(
            f"| `{row['kind']}` | {row['given']} | {row['FD']:.0f} | {of_trainings} | {row['sd over samplings']:.0f} "
            f"| {row['accuracy']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
