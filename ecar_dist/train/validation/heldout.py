"""The held-out latents of a run: compared with the config and between ranks, and read once, at the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.data.fit import check_fits
from ecar_dist.data.order.stream import Locations
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.shards.manifest import Manifest, load_manifest
from ecar_dist.data.sources import LatentSource
from ecar_dist.errors import DataError
from ecar_dist.runtime.start.agreement import agree_on
from ecar_dist.runtime.world import World
from ecar_dist.train.objective import Normalise
from ecar_dist.train.sources import cache_options
from ecar_dist.vae.codec import EncoderIdentity, check_same_encoder, normalise


@dataclass(frozen=True)
class HeldoutBatch:
    """`moments` fp16 [m, *shape]; `labels`, `sample_ids` int64 [m]; `counts` [m]: 0 for padding rows."""

    moments: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Heldout:
    """This rank's share of the held-out samples; every rank has the same number of batches, of the same size."""

    batches: list[HeldoutBatch]
    normalise: Normalise
    count: int  # samples of all ranks
    dataset_id: str


def open_heldout(config: RunConfig, world: World, encoder: EncoderIdentity | None) -> Heldout | None:
    """The first `train.validate_samples` of `data.heldout_latents`; None if there is no validation. Collective.

    encoder: of the run's own latents. Raises EcarError, on all ranks, if the held-out ones do not fit.
    """
    place = config.data.heldout_latents
    if place is None or config.train.validate_every_samples == 0:
        return None

    # The same set on all ranks, encoded like the training data.
    manifest = world.together(lambda: check_heldout(config, place, encoder))
    facts = {"dataset_id of data.heldout_latents": manifest.dataset_id}
    agree_on(world, "held-out data", facts, "give every node the same data set; its path may differ")

    count = min(manifest.count, config.train.validate_samples)
    batches = world.together(lambda: read_share(config, place, manifest, count, world))
    return Heldout(batches, partial(normalise, EncoderIdentity.from_dict(manifest.encoder)), count, manifest.dataset_id)


def check_heldout(config: RunConfig, place: str, encoder: EncoderIdentity | None) -> Manifest:
    """The manifest of the held-out latents. Raises DataError if they do not fit the run."""
    manifest = load_manifest(place)
    check_fits(config, [(place, manifest)])
    if encoder is not None:
        check_same_encoder(encoder, EncoderIdentity.from_dict(manifest.encoder), place)
    return manifest


def read_share(config: RunConfig, place: str, manifest: Manifest, count: int, world: World) -> list[HeldoutBatch]:
    """This rank's part of the first `count` samples, in the order of the set. Raises DataError."""
    # Every world.size-th sample; then padding rows in the last batches, so that all ranks make the same calls.
    size = config.batch.micro_batch_size
    ids = np.arange(world.rank, count, world.size)
    num_batches = math.ceil(math.ceil(count / world.size) / size)
    padded = np.zeros(num_batches * size, dtype=np.int64)
    padded[: len(ids)] = ids

    # Where the samples are.
    first = np.cumsum([0, *(entry.count for entry in manifest.shards)])
    shards = np.searchsorted(first, padded, side="right") - 1
    locations = Locations(padded, np.zeros_like(padded), shards, padded - first[shards], padded)

    # Read batch by batch; the shards are closed afterwards.
    source = LatentSource(place, cache_options(config.data))
    try:
        source.plan(sorted(set(shards.tolist())), {})
        parts = [source.read(locations.take(slice(at, at + size)), None) for at in range(0, len(padded), size)]
    except BadSamples as error:
        raise DataError(f"data.heldout_latents: {next(iter(error.reasons.values()))}") from None
    finally:
        source.close()
    moments, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    sample_ids = torch.from_numpy(padded)
    counts = torch.zeros(len(padded), dtype=torch.float64)
    counts[: len(ids)] = 1.0
    columns = (part.split(size) for part in (moments, labels, sample_ids, counts))
    return [HeldoutBatch(*row) for row in zip(*columns, strict=True)]
