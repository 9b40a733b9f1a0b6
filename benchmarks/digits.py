"""Training runs on scikit-learn's digits for comparisons: data as in the demo, runs through the command line, scores.

Everything is kept in a work folder and done only once: a comparison that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_tools.spectrum.report import read_latents
from ecar_dist.config.knobs_model import SampleSection
from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.data.codebook import codebook_of
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.evaluate.images import read_images, reconstruct
from ecar_dist.evaluate.score import LabelledImages, Scorer
from ecar_dist.flow.discrete.nearest_code import nearest_codes
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import patchify, unpatchify
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.sample.generate import SamplingPlan, generate_in_batches
from ecar_dist.sample.load import TrainedModel, open_trained
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.pixels import to_pixels

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cpu")  # for ranks and samplers: many small runs side by side, one thread each
IMAGE_SIZE, BATCH_SIZE = 32, 256


@dataclass(frozen=True)
class Run:
    """One training: a row of a comparison (`variant`), its seed, and the config it comes from."""

    variant: str
    seed: int
    config: Path
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def load(self, work: Path) -> RunConfig:
        return load_config(self.config, self.words(work))

    def words(self, work: Path) -> list[str]:
        """The config's overrides on the command line: paths, one rank, and the settings of the comparison."""
        images = work / "images"
        return [
            f"run.dir={work / 'runs'}",
            f"run.name={self.name}",
            f"run.seed={self.seed}",
            f"vae.path={work / 'vae'}",
            f"data.latents={work / 'latents'}",
            f"data.train_images={images / 'train'}",
            f"data.heldout_images={images / 'heldout'}",
            "batch.micro_batch_size=64",
            "checkpoint.keep=2",
            "log.tensorboard=false",
            "log.every_steps=10",
            *self.overrides,
        ]


@dataclass(frozen=True)
class Draw:
    """How to sample: fields of the config's `sample` section that differ from the run's own, and the seed."""

    seed: int
    changes: dict[str, Any] = field(default_factory=dict)

    def of(self, config: RunConfig) -> RunConfig:
        sample = SampleSection.model_validate(config.sample.model_dump() | self.changes)
        return config.model_copy(update={"sample": sample})

    @property
    def name(self) -> str:
        return "-".join([f"seed={self.seed}", *(f"{key}={value}" for key, value in sorted(self.changes.items()))])


def parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options of a comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each row")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the training length in the configs")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "demo/quality", help="folder that keeps data and runs")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--plot", type=Path, help="also plot quality against sampling cost to this file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    return parser


def prepare(work: Path) -> None:
    """Image shards, autoencoder, latents: what `make demo` does before it trains. Existing results are kept."""
    images, vae, latents = work / "images", work / "vae", work / "latents"
    steps = [
        (images / "heldout/manifest.json", ["shard", "digits", images, "--holdout", "0.2"]),
        (vae / "config.json", ["train-vae", images / "train", vae, "--latent-channels", "2"]),
        (latents / "000000.json", ["encode", images / "train", latents, "--vae", vae, "--image-size", str(IMAGE_SIZE)]),
        (latents / "manifest.json", ["finalize", latents]),
    ]
    for done, words in steps:
        if not done.exists():
            call(["-m", "data_tools", *map(str, words)], threads=2)


def train(work: Path, run: Run) -> Path:
    """The run's directory, trained to the end by the command. A finished run is not trained again."""
    if not is_trained(work, run):
        call(["-m", "ecar_dist", "train", str(run.config), *run.words(work)], threads=1)
    return run.load(work).run_directory


def is_trained(work: Path, run: Run) -> bool:
    attempts = RunDirectory(run.load(work).run_directory).attempts()
    return any(attempt.get("reason") == "done" for attempt in attempts)


def final_loss(directory: Path) -> float:
    """The mean training loss of the last tenth of a run."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(
        line["train/loss"] for line in lines if line["samples_seen"] >= 0.9 * lines[-1]["samples_seen"]
    )


def measure(work: Path, run: Run, draws: Sequence[Draw]) -> list[dict[str, Any]]:
    """The scores of a trained run, one per draw, with the cost of a sample. Kept in the run directory."""
    trained, found = None, []
    for draw in draws:
        file = run.load(work).run_directory / "compared" / f"{draw.name}.json"
        if not file.exists():
            trained = trained or open_trained(run.load(work).run_directory, DEVICE)
            scores = _score(work, trained, draw) | cost(trained.config, draw)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(scores | {"draw": draw.changes, "loss": final_loss(file.parent.parent)}))
        found.append(json.loads(file.read_text()) | cost(run.load(work), draw))
    return found


def cost(config: RunConfig, draw: Draw) -> dict[str, float]:
    """The cost of a run and of one of its samples, including the null passes of guidance."""
    return {
        "parameters": kind_of(config).parameters(config).total,
        "training_macs": kind_of(config).training_macs(config) * config.train.total_samples,
        "samples_seen": config.train.total_samples,
        "sampling_macs": kind_of(config).sampling_macs(draw.of(config)),
        "serial_calls": kind_of(config).serial_calls(draw.of(config)),
    }


def _score(work: Path, trained: TrainedModel, draw: Draw) -> dict[str, Any]:
    scorer, labels = _scorer(work)
    plan = SamplingPlan.from_config(draw.of(trained.config), DEVICE)
    batches = generate_in_batches(trained.model, plan, torch.from_numpy(labels), draw.seed, BATCH_SIZE)
    pixels = np.concatenate([to_pixels(trained.codec.decode(stages[-1])) for stages in batches])
    return scorer.score(LabelledImages(pixels, labels))


def score_of_codes(work: Path, size: int, patch_size: int) -> dict[str, Any]:
    """The scores of training images whose tokens are their nearest codes: the best that a model over codes can do."""
    folder = work / "latents"
    scorer, _ = _scorer(work)
    manifest = load_manifest(folder)
    codes = codebook_of([str(folder)], [manifest], size, patch_size).codes
    latents, labels = read_latents(folder, manifest, manifest.count)
    tokens = codes[nearest_codes(patchify(torch.from_numpy(latents), patch_size), codes)]
    codec = open_codec(Run("ecar", 0, ROOT / "configs/digits_cpu.yaml").load(work).vae, DEVICE)
    return scorer.score(LabelledImages(to_pixels(codec.decode(unpatchify(tokens, patch_size))), labels))


@cache
def _scorer(work: Path) -> tuple[Scorer, np.ndarray]:
    """The scorer of `ecar-dist evaluate` on these images, and the labels that it draws by default."""
    folders = (work / "images/train", work / "images/heldout")
    (real, source), (heldout, _) = (read_images(str(folder), IMAGE_SIZE) for folder in folders)
    codec = open_codec(Run("ecar", 0, ROOT / "configs/digits_cpu.yaml").load(work).vae, DEVICE)
    return Scorer(reconstruct(codec, real, DEVICE), real, heldout, source, DEVICE), real.labels


def side_by_side(action: Callable[..., Any], items: Iterable[tuple[Any, ...]], jobs: int, what: str) -> list[Any]:
    """The results of action(*item), in the order of the items, by `jobs` processes with one thread each."""
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(action, *item) for item in items]
        return [future.result() for future in tqdm(futures, desc=what, mininterval=5)]


def call(words: Sequence[str], threads: int) -> None:
    """Run Python with these arguments. Raises RuntimeError with the end of its error output if it fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")
