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
from pixels import BATCH_SIZE, SCORING, PixelRun, labels_of, measured, pixel_parser, scores_of

from data_tools.spectrum.report import read_latents
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.flow.path import stage_endpoints
from ecar_dist.flow.pyramid import latent_pyramid, noise_pyramid
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.sample.load import TrainedModel, open_trained
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

    scores = side_by_side(measure, [(work, run, options.samples) for run in runs], options.jobs, "scored")
    rows = []
    for kind in KINDS:
        rows += rows_of(kind, [one for run, one in zip(runs, scores, strict=True) if run.variant == kind])
    print(table(rows))
    rounds.publish({"setting": SETTING, **measured(work, options, rows)}, options.save)


def measure(work: Path, run: PixelRun, samples: int) -> list[list[dict[str, Any]]]:
    """Scores by number of given stages, one for each sampling seed. Kept in the run directory."""
    file = run.load(work).run_directory / f"attribution-{samples}.json"
    if not file.exists():
        trained = open_trained(run.load(work).run_directory, DEVICE)
        labels = labels_of(work, run.data, samples)
        scores: list[list[dict[str, Any]]] = [[] for _ in range(NUM_STAGES + 1)]
        for seed in SCORING:
            ends = real_ends(trained.config.flow.schedule, latents_of(work, run.data, labels, seed), seed)
            for given, of_given in enumerate(scores):
                pixels = drawn_after(trained, ends[:given], torch.from_numpy(labels), seed)
                of_given.append(scores_of(work, run.data, pixels, labels))
        file.write_text(json.dumps(scores))
    return json.loads(file.read_text())


def drawn_after(trained: TrainedModel, given: Sequence[torch.Tensor], labels: torch.Tensor, seed: int) -> np.ndarray:
    """Samples of these labels whose first stages are given (each [N, C, h_k, w_k]), uint8 [N, H, W, 3]."""
    plan = SamplingPlan.from_config(Draw(seed, SETTING).of(trained.config), DEVICE)
    pixels = []
    for chunk in torch.arange(len(labels)).split(BATCH_SIZE):
        stages = draw_stages(trained.model, plan, labels[chunk], chunk, seed, [end[chunk] for end in given])
        pixels.append(to_pixels(trained.codec.decode(stages[-1])))
    return np.concatenate(pixels)


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


def rows_of(kind: str, trainings: Sequence[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each number of given stages: distance to the second half of the held-out images, with both spreads.

    trainings: the scores of each training, by number of given stages and sampling seed.
    """
    rows = []
    for given in range(NUM_STAGES + 1):
        distances = [[one["FD"][1] for one in scores[given]] for scores in trainings]
        means = [statistics.mean(seeds) for seeds in distances]
        rows.append(
            {
                "kind": kind,
                "given": given,
                "FD": statistics.mean(means),
                "sd over trainings": statistics.stdev(means) if len(means) > 1 else None,
                "sd over samplings": statistics.mean(statistics.stdev(seeds) for seeds in distances),
                "accuracy": statistics.mean(one["accuracy"] for scores in trainings for one in scores[given]),
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
