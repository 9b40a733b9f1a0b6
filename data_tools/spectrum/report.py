"""`ecar-data stats --spectrum`: whether stages can pay off on a set of latents, before anything is trained."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from data_tools.spectrum.calls import MOST_STEPS, TOLERANCE, Forecast, forecast
from data_tools.spectrum.eigenvalues import SHARE, Spectrum, centred, halve, level_variances
from ecar_dist.command_line import counted
from ecar_dist.data.shards.manifest import Manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.storage.remote import file_in
from ecar_dist.vae.codec import EncoderIdentity, normalise

MAX_SAMPLES = 4096  # the first ones: shards are shuffled when they are written
MAX_VALUES = 4096  # of a sample; larger ones are halved
SHOWN = 5  # eigenvalues
TIME_SHIFTS = (1.0, 2.0, 3.0)
STAGES = (1, 2, 3)
WORTH = 1.2  # stages are worth trying if they need this many times fewer calls


def print_spectrum(folder: Path, manifest: Manifest) -> None:
    """Print the largest eigenvalues of the latents as training sees them, and the calls that they need.

    Memory: at most 4,096 samples of at most 4,096 values, some copies of them, and a matrix of 4,096 x 4,096.
    Raises DataError if each sample has a class of its own.
    """
    latents, labels = read_latents(folder, manifest, MAX_SAMPLES)
    channels, height, width = latents.shape[1:]

    # Large latents are halved. This leaves out the finest detail, where the small eigenvalues are.
    fields, pooled = latents, 0
    while fields[0].size > MAX_VALUES and fields.shape[2] % 2 == fields.shape[3] % 2 == 0:
        fields, _ = halve(fields)
        pooled += 1

    # Eigenvalues of the whole set, and within a class.
    overall = Spectrum.of(*centred(fields))
    within_class, freedom = centred(fields, labels)
    if freedom < 1:
        raise DataError(f"{folder}: {len(labels)} samples are too few for a spectrum; give more samples than classes")
    within = Spectrum.of(within_class, freedom)
    print(f"spectrum            {len(latents)} samples of {channels} x {height} x {width}, std {latents.std():.2f}")
    if pooled:
        side = " x ".join(str(n) for n in fields.shape[2:])
        print(f"                    of block means, {side}: details finer than that are left out")
    for name, spectrum in (("eigenvalues", overall), ("  within a class", within)):
        largest = " ".join(f"{value:.3g}" for value in spectrum.values[:SHOWN])
        print(f"{name:<20}{largest} ...; {SHARE:.0%} of the variance in {spectrum.dimensions} directions")

    # The forecasts: one stage and several, all with the same choice of time grids.
    print(f"midpoint calls for a variance error of {TOLERANCE:.0%} in these directions, for Gaussian data:")
    least = float(within.main[-1])
    best: dict[int, float] = {}
    for stages in STAGES:
        if height % 2 ** (stages - 1) or width % 2 ** (stages - 1):
            continue
        levels = level_variances(within_class, freedom, stages, pooled, least) if stages > 1 else [within.main]
        found = [forecast(levels, time_shift=shift) for shift in TIME_SHIFTS]
        for shift, one in zip(TIME_SHIFTS, found, strict=True):
            print(f"  {counted(stages, 'stage') + ',':<9} time shift {shift:g}  {_describe(one)}")
        best[stages] = min((one.cost for one in found if one), default=math.inf)
    _conclude(best)


def read_latents(folder: Path, manifest: Manifest, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `most` samples, normalised as in training, float32 [N, C, H, W]; and their labels, int64 [N]."""
    identity = EncoderIdentity.from_dict(manifest.encoder)
    noise = torch.Generator().manual_seed(0)
    parts: list[torch.Tensor] = []
    labels: list[np.ndarray] = []
    left = most
    for entry in manifest.shards:
        if left <= 0:
            break
        shard = open_latent_shard(file_in(folder, entry.name), entry, manifest)
        moments = torch.from_numpy(shard.moments[:left].copy())
        shape = (len(moments), identity.latent_channels, *moments.shape[2:])
        parts.append(normalise(identity, moments, torch.randn(shape, generator=noise)))
        labels.append(shard.labels[:left])
        left -= len(moments)
    return torch.cat(parts).numpy(), np.concatenate(labels)


def _describe(found: Forecast | None) -> str:
    if found is None:
        return f"more than {MOST_STEPS} steps in a stage"
    steps = "+".join(map(str, found.steps))
    return f"{found.calls:3d} calls, the cost of {found.cost:.1f} at full size (steps {steps})"


def _conclude(best: dict[int, float]) -> None:
    """Print whether stages can pay off. `best`: the lowest cost by number of stages; infinite if nothing was enough."""
    stages = min(best, key=lambda stages: (best[stages], stages))
    if not math.isfinite(best[stages]):
        return
    gain = best[1] / best[stages]
    verdict = "stages can pay off here" if gain > WORTH else "stages cannot save much here"
    print(f"cheapest: {counted(stages, 'stage')}, {gain:.2f} times cheaper than the best of 1 stage; {verdict}")
