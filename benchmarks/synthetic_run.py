"""A real training run on random latents, built and driven by the product's own code; a benchmark sees every step.

`driven` runs `train` itself. The loop asks its reader for samples once per step, so two of these calls delimit one
step: a `Visitor` is called there. On a GPU, the host is then still working on the previous step.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.shards.manifest import Manifest, write_manifest
from ecar_dist.data.shards.write import ShardContent, write_latent_shard
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.world import World
from ecar_dist.sample.preview import StripPreview
from ecar_dist.train.loop import Parts, train
from ecar_dist.train.start import start_training
from ecar_dist.vae.dct import DctCodec

CHANNELS, PATCH, CLASSES = 12, 2, 1000
SAMPLES, SHARDS = 2048, 2
LONG = 10**12  # samples: neither the end of the run nor a checkpoint is reached


class Enough(Exception):
    """Raised by a visitor to end the run between two steps, without a checkpoint."""


class Visitor(Protocol):
    """What `driven` calls between two steps."""

    def begin(self, parts: Parts) -> None:
        """Called when the run is built, before the first step."""

    def between(self, batches: Sequence[MicroBatch] | None) -> None:
        """Called after a step on `batches` and before the next one; None before the first."""


def write_latents(folder: Path, latent_size: int, samples: int = SAMPLES, shards: int = SHARDS) -> None:
    """Random latents, fp16 [12, S, S], as real shards with the identity of the block-DCT codec."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    shape = (CHANNELS, latent_size, latent_size)
    encoder = DctCodec(8, torch.device("cpu")).identity.to_dict()

    # The shards.
    entries = []
    for index in range(shards):
        count = samples // shards
        moments = generator.standard_normal((count, *shape), dtype=np.float32).astype(np.float16)
        content = ShardContent(index * count, moments, generator.integers(0, CLASSES, count))
        entry = write_latent_shard(folder, index, content, {"encoder": encoder, "plan_id": ""})
        assert entry is not None  # nobody else writes here
        entries.append(entry)

    # Their manifest.
    names = [str(label) for label in range(CLASSES)]
    write_manifest(folder, Manifest(samples, CLASSES, names, shape, False, encoder, {}, {}, entries))


def run_tree(folder: Path, name: str, preset: str, latent_size: int, micro_batch: int) -> dict[str, Any]:
    """The config of a single-rank run, without accumulation, on `folder`/latents."""
    return {
        "run": {"name": name, "dir": str(folder / "runs")},
        "model": {"preset": preset, "patch_size": PATCH},
        "vae": {"kind": "dct", "downsample": 8},
        "data": {
            "latents": str(folder / "latents"),
            "num_classes": CLASSES,
            "latent_channels": CHANNELS,
            "latent_size": latent_size,
        },
        "batch": {"global_batch_size": micro_batch, "micro_batch_size": micro_batch},
        "train": {"total_samples": LONG},
        "checkpoint": {"every_samples": LONG},
    }


def run_config(folder: Path, name: str, preset: str, latent_size: int, micro_batch: int, **sections: Any) -> RunConfig:
    """As `run_tree`; the values of `sections` are added."""
    tree = run_tree(folder, name, preset, latent_size, micro_batch)
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return config_from_dict(tree)


def driven(config: RunConfig, world: World, visitor: Visitor) -> None:
    """Run `ecar-dist train` in this process, including its construction, until the visitor raises `Enough`; silent."""
    with contextlib.ExitStack() as ends:
        ends.enter_context(contextlib.redirect_stdout(io.StringIO()))
        ends.enter_context(contextlib.suppress(Enough))
        parts, progress = start_training(
            config,
            world,
            ends,
            training_flops_per_sample=FLOPS_PER_MAC * kind_of(config).training_macs(config),
            preview_factory=StripPreview,
        )
        visitor.begin(parts)
        begin = parts.reader.begin
        batches: list[Sequence[MicroBatch] | None] = [None]  # of the previous step

        def visited(progress: Progress) -> Sequence[MicroBatch] | None:
            visitor.between(batches[0])
            batches[0] = begin(progress)
            return batches[0]

        parts.reader.begin = visited
        train(parts, progress)
        sys.exit(f"stopped by {parts.stop.received}")
