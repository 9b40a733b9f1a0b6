"""`ecar-data pyramid-check`: whether the latents of an autoencoder pool like its images.

The stages of a flow learn pooled latents. If the autoencoder downsamples little, these resemble the latents of a
smaller picture. This is not guaranteed if it packs 32 x 32 pixels into the channels of one latent pixel.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_tools.encode.settings import latent_side, resolve_device
from data_tools.images.reader import ImageReader, open_images
from data_tools.images.tar_samples import LabelRule
from data_tools.progress import progress
from ecar_dist.command_line import columns, counted
from ecar_dist.data.images.decode import PilDecoder
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.flow.pyramid import latent_pyramid, upsample
from ecar_dist.storage.redaction import redact
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import LatentCodec, normalised_mean
from ecar_dist.vae.pixels import from_pixels

_BATCH = 16  # images that are encoded and decoded at once
_PEAK = 255.0  # differences are in 8-bit levels


@dataclass
class Distance:
    """The difference of images in [-1, 1], summed over batches."""

    squares: float = 0.0
    absolutes: float = 0.0
    numbers: int = 0

    def add(self, images: torch.Tensor, reference: torch.Tensor) -> None:
        """Both are [B, 3, H, W]."""
        difference = (images - reference).double() * (_PEAK / 2)
        self.squares += difference.square().sum().item()
        self.absolutes += difference.abs().sum().item()
        self.numbers += difference.numel()

    @property
    def psnr(self) -> float:
        """In dB; infinite if the images are equal."""
        return 10.0 * math.log10(_PEAK**2 * self.numbers / self.squares) if self.squares else math.inf

    @property
    def mean_absolute(self) -> float:
        """In 8-bit levels, from 0 to 255."""
        return self.absolutes / self.numbers


@dataclass
class StageCheck:
    """One stage. z: latents of the images x. D and U: down to the size of the stage, and back up to full size.

    pooled: Dec(D(z)) against D(x). enlarged: Dec(U(D(z))) against U(D(x)). encoded: Dec(Enc(D(x))) against D(x), the
    error of the autoencoder itself at that size.
    """

    latent_size: int  # side of D(z)
    image_size: int  # side of D(x), in pixels
    pooled: Distance = field(default_factory=Distance)
    enlarged: Distance = field(default_factory=Distance)
    encoded: Distance = field(default_factory=Distance)

    @property
    def lost(self) -> float:
        """dB by which Dec(D(z)) is farther from D(x) than Dec(Enc(D(x))) is; at least 0."""
        return 0.0 if self.pooled.psnr >= self.encoded.psnr else self.encoded.psnr - self.pooled.psnr


def pyramid_check(
    source: str,
    *,
    vae: str,
    image_size: int,
    stages: int = 3,
    count: int = 256,
    flat: bool = False,
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Print, for each stage of a flow, how far decoded pooled latents are from pooled images.

    Latents are means of the posterior. The images are a random choice of `count` from the source, the same in every
    run. Raises ConfigError if the sizes do not fit, DataError if no image can be decoded.
    """
    target = torch.device(resolve_device(device))
    codec = open_codec_by_spec(vae, target)
    side = latent_side(image_size, codec.identity.downsample)
    halvings = 2 ** (stages - 1)
    if side % halvings:
        raise ConfigError(
            f"latents of {side} x {side} cannot be halved for --stages {stages}; give fewer stages, or an --image-size "
            f"that is a multiple of {codec.identity.downsample * halvings}"
        )
    checks = [StageCheck(side * 2**k // halvings, image_size * 2**k // halvings) for k in range(stages)]

    # All stages of a batch at once. Messages of the indexing go to stderr: stdout is for the result.
    number = 0
    with contextlib.redirect_stdout(sys.stderr), open_images(source, LabelRule("cls"), flat=flat) as reader:
        left_out = min(count, len(reader.labels))
        for images in _batches(reader, image_size, count):
            number += len(images)
            left_out -= len(images)
            check_batch(codec, images.to(target), checks)
    if not number:
        raise DataError(f"none of the images of {redact(source)} can be decoded; check the source")

    if as_json:
        print(json.dumps(_as_dict(codec, number, checks)))
        return
    if left_out:
        print(f"{counted(left_out, 'image')} left out: cannot be decoded")
    _report(codec, number, checks)


@torch.no_grad()
def check_batch(codec: LatentCodec, images: torch.Tensor, checks: list[StageCheck]) -> None:
    """Add images [B, 3, H, W] in [-1, 1] to the checks of all stages, coarse to fine."""
    latents = normalised_mean(codec.identity, codec.encode(images))
    stages = zip(checks, latent_pyramid(latents, len(checks)), latent_pyramid(images, len(checks)), strict=True)
    for check, pooled, resized in stages:
        check.pooled.add(codec.decode(pooled), resized)
        again = normalised_mean(codec.identity, codec.encode(resized))
        check.encoded.add(codec.decode(again), resized)

        # With nearest neighbours, one enlargement equals the repeated enlargements of all later stages.
        factor = images.shape[-1] // resized.shape[-1]
        check.enlarged.add(codec.decode(upsample(pooled, factor)), upsample(resized, factor))


def _batches(reader: ImageReader, image_size: int, count: int) -> Iterator[torch.Tensor]:
    """Random images of a source, float32 [B, 3, S, S] in [-1, 1]. Those that cannot be decoded are left out."""
    total = len(reader.labels)
    chosen = sample_indices(np.arange(min(count, total)), total, seed=0)
    decoder = PilDecoder()
    with progress(len(chosen), "image", "pyramid-check") as bar:
        for first in range(0, len(chosen), _BATCH):
            records = reader.read_many(chosen[first : first + _BATCH].tolist())
            pixels = decoder.separate([record.data for record in records], records, image_size).pixels
            if len(pixels):
                yield from_pixels(pixels)
            bar.update(len(records))


def _report(codec: LatentCodec, number: int, checks: list[StageCheck]) -> None:
    """One row per stage, coarse to fine."""
    identity = codec.identity
    shape = f"{identity.latent_channels} x {checks[-1].latent_size} x {checks[-1].latent_size}"
    print(
        f"{identity.name}: latents of {shape}, {counted(number, 'image')}; PSNR in dB, mean |difference| of 255 levels"
    )
    heads = ["stage", "latent", "image", "Dec(D(z)) to D(x)", "Dec(U(D(z))) to U(D(x))", "Dec(Enc(D(x))) to D(x)"]
    rows = [
        [
            str(stage),
            f"{check.latent_size} x {check.latent_size}",
            f"{check.image_size} x {check.image_size}",
            *(f"{one.psnr:.2f}, {one.mean_absolute:.2f}" for one in (check.pooled, check.enlarged, check.encoded)),
        ]
        for stage, check in enumerate(checks)
    ]
    print("\n".join(columns([heads, *rows])))

    worst = max(range(len(checks)), key=lambda stage: checks[stage].lost)
    lost = f"{checks[worst].lost:.2f}"
    if lost == "0.00":
        print("pooled latents are as good as those of the resized images, in all stages")
    else:
        print(f"pooling costs most in stage {worst}: {lost} dB, against the latents of the resized images")


def _as_dict(codec: LatentCodec, number: int, checks: list[StageCheck]) -> dict[str, Any]:
    """For JSON, which has no infinity: a PSNR is None if the images are equal."""

    def distance(one: Distance) -> dict[str, float | None]:
        return {"psnr": one.psnr if math.isfinite(one.psnr) else None, "mean_absolute": one.mean_absolute}

    return {
        "autoencoder": codec.identity.name,
        "images": number,
        "stages": [
            {
                "latent_size": check.latent_size,
                "image_size": check.image_size,
                "pooled": distance(check.pooled),
                "enlarged": distance(check.enlarged),
                "encoded": distance(check.encoded),
            }
            for check in checks
        ],
    }
