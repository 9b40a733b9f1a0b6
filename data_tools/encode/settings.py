"""From the options of `ecar-data plan` and `encode` to a plan, and the `plan` command itself."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_tools.encode.plan import CHUNKED_FROM, EncodePlan, settle_plan
from ecar_dist.data.images.decode import ImageDecoder, image_sides, open_decoder
from ecar_dist.data.images.formats import background_name, parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.order.chunks import ChunkOrder
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.manifest_rules import MAX_SIDE
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.redaction import redact
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec
from ecar_dist.vae.table import CODECS

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK = 32  # images; docs/scale.md compares sizes
_LEAST_CHUNKS = 64  # per shard: its images come from at least so many places of the source
_SIZED_IMAGES = 64  # images whose size is measured, spread over the first shard


@dataclass(frozen=True)
class EncodeSettings:
    """The options that determine the bytes of a set. `device` is that of the workers."""

    vae: str
    image_size: int | None = None  # None: an error that proposes one
    samples_per_shard: int = 4096
    seed: int = 0
    decoder: str = "auto"
    resize: str = "cubic"
    device: str = "auto"
    precision: str = "fp32"
    flip: str = "none"
    background: str = "white"
    chunk: int | None = None  # None: depends on the number of images

    def open_codec(self, device: str | torch.device) -> LatentCodec:
        return open_codec_by_spec(self.vae, device, _PRECISIONS[self.precision])

    def open_decoder(self, device: torch.device, *, drop_transparency: bool = False) -> ImageDecoder:
        """`auto`: DALI on the workers' device, or PIL for --resize adm. `dali-cpu`: DALI on the CPU of a GPU node."""
        kind = self.decoder
        if kind == "auto":
            kind = "pil" if self.resize == "adm" else "dali"
        mixed = kind == "dali" and device.type == "cuda"
        background = None if drop_transparency else parse_background(self.background)
        return open_decoder(kind.removesuffix("-cpu"), "mixed" if mixed else "cpu", self.resize, background)

    def draft(
        self, shards: str | Path, images: ImageShards, identity: EncoderIdentity, decoder: ImageDecoder
    ) -> EncodePlan:
        """The plan for these settings, not yet written: see `settle_plan`.

        Raises ConfigError if `image_size` is missing or does not fit the autoencoder.
        """
        if self.image_size is None:
            raise _missing_image_size(images, identity.downsample)
        side = latent_side(self.image_size, identity.downsample)
        versions = {"torch": torch.__version__, "decoder": decoder.library}
        if CODECS[identity.kind].needs_path:
            versions["diffusers"] = version("diffusers")
        return EncodePlan(
            source_folder=redact(str(shards)),
            source_dataset_id=images.manifest.dataset_id,
            count=len(images),
            num_classes=images.manifest.num_classes,
            class_names=images.manifest.class_names,
            samples_per_shard=self.samples_per_shard,
            seed=self.seed,
            image_size=self.image_size,
            moments_shape=(identity.moments_channels, side, side),
            encoder=identity.to_dict(),
            decoder=decoder.name,
            resize=decoder.resize,
            precision=self.precision,
            flip=self.flip,
            versions=versions,
            background=background_name(parse_background(self.background)),
            order=self._order(images),
        )

    def _order(self, images: ImageShards) -> ChunkOrder | None:
        """Raises ConfigError for a chunk that is larger than a shard."""
        chunk = self.chunk
        if chunk is None:
            many = images.manifest.in_tars and len(images) >= CHUNKED_FROM
            chunk = min(_CHUNK, self.samples_per_shard // _LEAST_CHUNKS) if many else 1
        if chunk > self.samples_per_shard:
            raise ConfigError(
                f"--chunk {chunk} is more than --samples-per-shard {self.samples_per_shard}; give a smaller one"
            )
        return ChunkOrder(chunk) if chunk > 1 else None


def plan(shards: str | Path, out: Path, *, tasks: int = 1, **settings: Any) -> None:
    """Write the plan of `encode` with these settings, and print it with the command of each task.

    `settings` are the fields of EncodeSettings. Raises the errors of `encode`. Decodes no image and needs no GPU.
    """
    chosen = EncodeSettings(**settings)
    images = ImageShards(shards)
    codec = chosen.open_codec("cpu")

    # The workers may run on another machine, so a named device is not checked here.
    target = torch.device(resolve_device("auto") if chosen.device == "auto" else chosen.device)
    decoder = chosen.open_decoder(target)
    drafted = chosen.draft(shards, images, codec.identity, decoder)
    settled = settle_plan(out, drafted, keep_order=chosen.chunk is None)

    warn_if_enlarged(images, settled.image_size)
    if chosen.device == "auto" and target.type == "cpu":
        print("workers   on the CPU, because this machine has no GPU; give --device cuda if the workers have one")
    _print_plan(settled, out, tasks)


def resolve_device(device: str) -> str:
    """`auto` is the GPU if there is one. Raises ConfigError for a GPU that torch does not see."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}, but torch sees no GPU here; use --device cpu")
    return device


def warn_if_enlarged(images: ImageShards, image_size: int) -> None:
    """Warn on stderr if most images are smaller than `image_size`. Images that cannot be read are not counted."""
    try:
        sides = _shorter_sides(images)
    except DataError:
        return
    smaller = sum(side < image_size for side in sides)
    if smaller * 2 > len(sides):
        print(
            f"ecar-data: warning: {smaller} of {len(sides)} sampled images are smaller than --image-size {image_size} "
            f"and will be enlarged (median of their shorter sides: {statistics.median_low(sides)} pixels)",
            file=sys.stderr,
        )


def _missing_image_size(images: ImageShards, downsample: int) -> ConfigError:
    """An error that proposes a size, if sizes can be read."""
    sides = _shorter_sides(images)
    if not sides:
        return ConfigError(
            f"--image-size is missing, and the size of the images of {images.manifest.source} cannot be read; give the "
            f"side of the square images in pixels, a multiple of {downsample}"
        )
    return ConfigError(
        f"--image-size is missing; the shorter sides of {len(sides)} images of the first shard are {min(sides)} to "
        f"{max(sides)} pixels, median {statistics.median_low(sides)}; give e.g. --image-size "
        f"{_largest_fitting(sides, downsample)}"
    )


def propose_image_size(images: ImageShards, downsample: int) -> int:
    """The largest downsample x 2^n that is at most the median of the shorter sides.

    Raises ConfigError if no image size can be read.
    """
    if not (sides := _shorter_sides(images)):
        raise _missing_image_size(images, downsample)
    return _largest_fitting(sides, downsample)


def _largest_fitting(sides: Sequence[int], downsample: int) -> int:
    proposal = downsample
    while proposal * 2 <= statistics.median_low(sides):
        proposal *= 2
    return proposal


def _shorter_sides(images: ImageShards) -> list[int]:
    count = images.manifest.shards[0].count
    records = images.read_many(range(0, count, -(-count // _SIZED_IMAGES)))
    return [min(sides) for record in records if (sides := image_sides(record.data)) is not None]


def latent_side(image_size: int, downsample: int) -> int:
    """Side of the latents of square images. Raises ConfigError if it is not a whole number."""
    if image_size > MAX_SIDE:
        raise ConfigError(f"--image-size {image_size} is more than {MAX_SIDE}; give a smaller one")
    side, rest = divmod(image_size, downsample)
    if rest or side < 1:
        raise ConfigError(
            f"--image-size {image_size} is not a positive multiple of {downsample}, the downsampling of the "
            f"autoencoder; give e.g. {max(1, round(image_size / downsample)) * downsample}"
        )
    return side


def _print_plan(plan: EncodePlan, out: Path, tasks: int) -> None:
    stride = ShardLayout.of(1, plan.moments_shape, plan.has_flip).stride
    shape = "x".join(map(str, plan.moments_shape))
    print(f"plan      {plan.plan_id}")
    print(f"samples   {plan.count} of {shape} fp16" + (", and mirrored" if plan.has_flip else ""))
    print(f"shards    {plan.num_shards} of at most {plan.samples_per_shard} samples")
    print(f"bytes     {plan.count * stride / 1e9:.3f} GB, {stride} per sample")
    if plan.order is not None:
        print(f"order     chunks of {plan.order.chunk} consecutive images")
    print(f"decoding  {plan.decoder}, resize {plan.resize}, autoencoder in {plan.precision}")
    print(f"tasks     {tasks}, at most {math.ceil(plan.num_shards / tasks)} shards each; the command of task i:")
    print(plan.command(out, 0, tasks).replace("--task 0 ", "--task i "))
