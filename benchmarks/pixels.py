"""Training runs on the pixels of pictures for comparisons: runs through the command line, choices, scores.

The pictures of 32 x 32 pixels are their own latents (codec `identity`). Every variant chooses its guidance and its time
shift on one half of the held-out pictures and is scored on the other. Everything is kept in a work folder and done only
once.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import decisive_rule as rule
import numpy as np
import rounds
import torch
from digits import DEVICE, ROOT, Draw, Run, call, cost, final_loss, is_trained, parser, side_by_side

from data_tools.images.photos import PHOTOGRAPHS
from ecar_dist.config.run import RunConfig
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.evaluate.bands import band_variances
from ecar_dist.evaluate.classifier import ScoringClassifier, features_and_predictions, train_classifier
from ecar_dist.evaluate.frechet import frechet_distance
from ecar_dist.evaluate.images import read_images
from ecar_dist.kinds.table import kind_of
from ecar_dist.sample.generate import SamplingPlan, generate_in_batches
from ecar_dist.sample.load import open_trained
from ecar_dist.vae.pixels import to_pixels

CONFIG = ROOT / "benchmarks/decisive.yaml"
IMAGE_SIZE, BATCH_SIZE = 32, 250
GUIDANCE: tuple[dict[str, Any], ...] = (
    {"guidance_scale": 1.0},
    *(
        {"guidance_scale": scale, "guidance_ramp": "constant", "guidance_interval": interval}
        for scale, interval in product((1.3, 1.7), ((0.0, 1.0), (0.3, 1.0)))
    ),
)
SHIFTS = (1.0, 2.0, 3.0)
CLASSIFIER_IMAGES = 40_000  # that the scoring classifier sees in training
CHOOSING, SCORING = 0, (1, 2, 3)  # sampling seeds


def pixel_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison on pixels."""
    options = parser(description, seeds=2)
    options.set_defaults(work=ROOT / "demo/decisive")
    options.add_argument(
        "--data", choices=("photos", "emoji"), default="photos", help="built-in source (default: photos)"
    )
    options.add_argument("--samples", type=int, default=500, help="for each score and sampling seed (default: 500)")
    options.add_argument("--choosing-samples", type=int, default=250, help="for each choice (default: 250)")
    return options


@dataclass(frozen=True)
class PixelRun(Run):
    """One training. data: the built-in source of images. model: the overrides that select its kind."""

    data: str = "photos"
    model: tuple[str, ...] = ()

    def words(self, work: Path) -> list[str]:
        folder = work / self.data
        return [
            f"run.dir={folder / 'runs'}",
            f"run.name={self.name}",
            f"run.seed={self.seed}",
            f"data.latents={folder / 'latents'}",
            f"data.num_classes={load_manifest(str(folder / 'latents')).num_classes}",
            f"data.train_images={folder / 'images/train'}",
            f"data.heldout_images={folder / 'images/heldout'}",
            *self.model,
            *self.overrides,
        ]


def prepare(work: Path, data: str) -> None:
    """Image shards and latents, which are the pixels. Existing results are kept."""
    images, latents = work / data / "images", work / data / "latents"
    encode = ["encode", images / "train", latents, "--vae", "identity-f1", "--image-size", str(IMAGE_SIZE)]
    steps = [
        (images / "heldout/manifest.json", ["shard", data, images, "--holdout", "0.2"]),
        (latents / "000000.json", encode),
        (latents / "manifest.json", ["finalize", latents]),
    ]
    for done, words in steps:
        if not done.exists():
            call(["-m", "data_tools", *map(str, words)], threads=2)
    if data == "photos":
        require_all_photographs(work / data, load_manifest(str(latents)).num_classes)


def require_all_photographs(folder: Path, found: int) -> None:
    """Each class is one photograph. Raises SystemExit if the packages with some of them were not installed."""
    wanted = sum(len(names) for _, names in PHOTOGRAPHS.values())
    if found != wanted:
        raise SystemExit(
            f"{folder} has crops of {found} photographs, but results are for {wanted}; "
            "pip install 'ecar-dist[photos]', then remove that folder"
        )


def at_compute(work: Path, run: PixelRun, budget: float) -> PixelRun:
    """The run with as many samples as the budget in MACs allows; warm-up, EMA and saves are in proportion."""
    config = run.load(work)
    batch = config.batch.global_batch_size
    samples = max(1, round(budget / kind_of(config).training_macs(config) / batch)) * batch
    lengths = {
        "run.name": f"{run.name}-{samples}",  # a run of a different length is a different run
        "train.total_samples": samples,
        "optim.warmup_samples": samples // 12,
        "ema.half_life_samples": max(batch, samples // 8),
        "checkpoint.every_samples": max(batch, samples // 4),
    }
    return replace(run, overrides=(*run.overrides, *(f"{key}={value}" for key, value in lengths.items())))


def train(work: Path, run: PixelRun) -> None:
    if not is_trained(work, run):
        call(["-m", "ecar_dist", "train", str(run.config), *run.words(work)], threads=1)


def choose(
    work: Path,
    runs: Sequence[PixelRun],
    typical: Mapping[str, dict[str, Any]],
    steps: Mapping[str, Sequence[dict[str, Any]]],
    samples: int,
    jobs: int,
) -> dict[str, dict[str, Any]]:
    """For each variant: the guidance, and the time shift of each of its `steps`, on the first half.

    The guidance is chosen at the `typical` number of steps.
    """
    sweep = {name: [one | guided for guided in GUIDANCE] for name, one in typical.items()}
    found = _distances(work, runs, sweep, samples, jobs, "guidance")
    guidance = {name: GUIDANCE[means.index(min(means))] for name, means in found.items()}

    # Then the shift, for each number of steps. It changes nothing if a stage is one step.
    shifts = {name: [SHIFTS if max(one["steps_per_stage"]) > 1 else (1.0,) for one in steps[name]] for name in typical}
    shifted = {
        name: [
            one | guidance[name] | {"time_shift": shift}
            for one, some in zip(steps[name], shifts[name], strict=True)
            for shift in some
        ]
        for name in typical
    }
    found = _distances(work, runs, shifted, samples, jobs, "shifts")

    # The best shift of each setting, in the order of the settings.
    chosen = {}
    for name, of_settings in shifts.items():
        means = iter(found[name])
        distances = [{shift: next(means) for shift in some} for some in of_settings]
        chosen[name] = {"guidance": guidance[name], "shifts": [min(each, key=each.__getitem__) for each in distances]}
    return chosen


def shifted_settings(steps: Sequence[dict[str, Any]], best: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("shifted", setting) for each number of steps, with the guidance and the shift of `choose`."""
    pairs = zip(steps, best["shifts"], strict=True)
    return [("shifted", one | best["guidance"] | {"time_shift": shift}) for one, shift in pairs]


def _distances(
    work: Path,
    runs: Sequence[PixelRun],
    settings: dict[str, list[dict[str, Any]]],
    samples: int,
    jobs: int,
    what: str,
) -> dict[str, list[float]]:
    """By variant, for each of its settings: the distance to the first half, as a mean over trainings."""
    items = [(work, run, [Draw(CHOOSING, one) for one in settings[run.variant]], samples) for run in runs]
    measured = side_by_side(measure, items, jobs, what)
    distances: dict[str, list[list[float]]] = {name: [] for name in settings}
    for run, of_run in zip(runs, measured, strict=True):
        distances[run.variant].append([one["FD"][0] for one in of_run])
    return {
        name: [statistics.mean(of_setting) for of_setting in zip(*trainings, strict=True)]
        for name, trainings in distances.items()
    }


def score(
    work: Path,
    runs: Sequence[PixelRun],
    settings: Mapping[str, Sequence[tuple[str, dict[str, Any]]]],
    samples: int,
    jobs: int,
) -> list[dict[str, Any]]:
    """A row for each training and setting, over the sampling seeds, on the second half of the held-out images.

    settings: for each variant, pairs of (name of the time grid, setting).
    """
    draws = {name: [Draw(seed, one) for _, one in some for seed in SCORING] for name, some in settings.items()}
    measured = side_by_side(measure, [(work, run, draws[run.variant], samples) for run in runs], jobs, "scored")

    rows = []
    for run, of_run in zip(runs, measured, strict=True):
        for place, (grid, setting) in enumerate(settings[run.variant]):
            seeds = of_run[place * len(SCORING) : (place + 1) * len(SCORING)]
            rows.append(rule.row(run.variant, grid, run.seed, setting, seeds))
    return rows


def measure(work: Path, run: PixelRun, draws: Sequence[Draw], samples: int) -> list[dict[str, Any]]:
    """Scores of a trained run, one per draw, with the cost of a sample. Kept in the run directory."""
    trained, found = None, []
    for draw in draws:
        name = draw.name.replace(" ", "").replace("/", "_")
        file = run.load(work).run_directory / "scored" / f"{name}-{samples}.json"
        if not file.exists():
            trained = trained or open_trained(run.load(work).run_directory, DEVICE)
            labels = labels_of(work, run.data, samples)
            plan = SamplingPlan.from_config(draw.of(trained.config), DEVICE)
            batches = generate_in_batches(trained.model, plan, torch.from_numpy(labels), draw.seed, BATCH_SIZE)
            pixels = np.concatenate([to_pixels(trained.codec.decode(stages[-1])) for stages in batches])
            scores = (
                scores_of(work, run.data, pixels, labels)
                | cost(trained.config, draw)
                | {"calls": calls(trained.config, draw)}
            )
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(scores | {"draw": draw.changes, "loss": final_loss(file.parent.parent)}))
        found.append(json.loads(file.read_text()))
    return found


def calls(config: RunConfig, draw: Draw) -> int:
    """Sequential velocity calls, without the null passes of guidance, which run in the same batch."""
    from ecar_dist.kinds.flops import velocity_calls

    return sum(velocity_calls(draw.of(config)))


def labels_of(work: Path, data: str, samples: int) -> np.ndarray:
    """Labels for the samples: classes as frequent as in the training set, in a fixed random order."""
    return in_proportion(labels_of_training(work, data), samples)


def in_proportion(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` labels in the proportions of `labels`, which may be sorted by class; in a fixed random order."""
    places = np.arange(count) * len(labels) // count
    return np.random.default_rng(0).permutation(np.sort(labels)[places])


def scores_of(work: Path, data: str, pixels: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Against both halves of the held-out images: Frechet distance and variance ratios by band; and accuracy."""
    features, predictions = features_and_predictions(classifier(work, data), pixels)
    halves, bands = heldout_halves(work, data)
    of_samples = band_variances(pixels, DEVICE)
    return {
        "FD": [frechet_distance(features, half) for half in halves],
        "bands": [{band: of_samples[band] / one[band] for band in one} for one in bands],
        "accuracy": float((predictions == labels).mean()),
    }


def measured(work: Path, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a result that all comparisons on pixels have."""
    return {
        "data": options.data,
        "floor": floor(work, options.data, options.samples),
        "rows": rows,
        "samples": options.samples,
        "hardware": options.hardware or rounds.hardware(),
    }


@cache
def floor(work: Path, data: str, samples: int) -> dict[str, Any]:
    """The distance of real training images to the second half, over random subsets with as many images as samples."""
    images, _ = pictures(work, data, "train")
    features, _ = features_and_predictions(classifier(work, data), images.pixels)
    halves, _ = heldout_halves(work, data)
    found = []
    for seed in range(5):
        chosen = np.random.default_rng(seed).permutation(len(features))[:samples]
        found.append(frechet_distance(features[chosen], halves[1]))
    return {"mean": statistics.mean(found), "std": statistics.stdev(found)}


@cache
def pictures(work: Path, data: str, part: str) -> Any:
    return read_images(str(work / data / "images" / part), IMAGE_SIZE)


@cache
def classifier(work: Path, data: str) -> ScoringClassifier:
    """Trained once, on the training images alone, and kept for the processes that score."""
    num_classes = load_manifest(str(work / data / "latents")).num_classes
    file = work / data / "classifier.pt"
    if not file.exists():
        images, _ = pictures(work, data, "train")
        epochs = max(4, CLASSIFIER_IMAGES // len(images.labels))
        trained = train_classifier(images.pixels, images.labels, num_classes, DEVICE, epochs=epochs)
        torch.save(trained.state_dict(), file)
    model = ScoringClassifier(num_classes)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@cache
def labels_of_training(work: Path, data: str) -> np.ndarray:
    """The labels of the training images, read without decoding an image."""
    shards = ImageShards(str(work / data / "images/train"))
    return np.array([shards.read(index).label for index in range(len(shards))], dtype=np.int64)


@cache
def heldout_halves(work: Path, data: str) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Features and band variances of two random halves of the held-out images."""
    images, _ = pictures(work, data, "heldout")
    features, _ = features_and_predictions(classifier(work, data), images.pixels)
    order = np.random.default_rng(0).permutation(len(features))
    halves = np.array_split(order, 2)
    return [features[half] for half in halves], [band_variances(images.pixels[half], DEVICE) for half in halves]
