"""`ecar-data plan | encode`: image shards -> latent shards. Resumable, and split over any number of tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_tools.encode.commit import commit, is_committed, recover
from data_tools.encode.failures import MAX_BAD, FailureTally
from data_tools.encode.plan import EncodePlan, settle_plan
from data_tools.encode.worker import EncodeWorker
from data_tools.images.sizes import require_image_size, warn_if_enlarged
from data_tools.moments_statistics import measure
from data_tools.progress import progress
from ecar_dist.data.images.decode import ImageDecoder, open_decoder
from ecar_dist.data.images.formats import background_name, parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.manifest_rules import MAX_SIDE
from ecar_dist.errors import ConfigError
from ecar_dist.storage.redaction import redact
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncodeSettings:
    """What the user decides about the bytes of a set; `device` is that of the workers."""

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


def encode(
    shards: str | Path,
    out: Path,
    *,
    task: int = 0,
    tasks: int = 1,
    batch_size: int = 64,
    max_bad: float = MAX_BAD,
    **settings: Any,
) -> None:
    """Make the shards task, task + tasks, ... of the plan that are not there yet. `settings`: of EncodeSettings.

    A bad image is left out and listed in errors.jsonl. Raises DataError for more than max_bad x count of them, for a
    source that is missing or damaged, and for an occupied OUT; ConfigError for settings that do not fit.
    """
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is outside 0..{tasks - 1} for --tasks {tasks}; count tasks from 0")
    chosen = EncodeSettings(**settings)
    target = torch.device(resolve_device(chosen.device))
    images, codec = ImageShards(shards), open_codec_by_spec(chosen.vae, target, _PRECISIONS[chosen.precision])
    image_decoder = _open_decoder(chosen, target)
    tally = FailureTally(out, len(images), max_bad)
    plan = settle_plan(out, _plan(shards, images, codec.identity, image_decoder, chosen))
    todo = [index for index in range(task, plan.num_shards, tasks) if not is_committed(out, index, plan)]
    if todo:
        warn_if_enlarged(images, plan.image_size)
    if plan.background is None:
        print(f"{out} was begun by a version that dropped transparency and goes on so; for --background, start anew")
        image_decoder = _open_decoder(chosen, target, drop_transparency=True)
    with progress(sum(len(plan.rows(index)) for index in todo), "image", "encode") as bar:
        worker = EncodeWorker(images, image_decoder, codec, target, batch_size, tally, bar)
        with contextlib.closing(worker):
            try:
                for index in todo:
                    _encode_shard(worker, plan, out, index)
            finally:
                failed = tally.write(worker.open_failures)
    names = set(os.listdir(out))
    there = sum(f"{index:06d}.json" in names for index in range(plan.num_shards))
    said = f"{out}: task {task} of {tasks} is done, {len(todo)} shards by this run, failed images so far: {failed}"
    if image_decoder.animated:
        said += f", animated or with several pages: {image_decoder.animated}, of which the first picture is used"
    print(f"{said}; {_what_next(out, there, plan.num_shards, max_bad)}")


def plan(shards: str | Path, out: Path, *, tasks: int = 1, **settings: Any) -> None:
    """Settle what `encode` will make with these `settings`, and print it with the command of each task.

    Raises as `encode` does. No image is decoded and no GPU is needed.
    """
    chosen = EncodeSettings(**settings)
    images, codec = ImageShards(shards), open_codec_by_spec(chosen.vae, "cpu", _PRECISIONS[chosen.precision])
    # a named device may be elsewhere
    target = torch.device(resolve_device("auto") if chosen.device == "auto" else chosen.device)
    image_decoder = _open_decoder(chosen, target)
    settled = settle_plan(out, _plan(shards, images, codec.identity, image_decoder, chosen))
    warn_if_enlarged(images, settled.image_size)
    if chosen.device == "auto" and target.type == "cpu":
        print("workers   on the CPU, as this machine has no GPU; --device cuda if they have one")
    _print_plan(settled, out, tasks)


def _what_next(out: Path, there: int, num_shards: int, max_bad: float) -> str:
    if there < num_shards:
        return f"{there} of {num_shards} shards are there; other tasks make the rest"
    return f"next: ecar-data finalize {out}" + f" --max-bad {max_bad:g}" * (max_bad != MAX_BAD)


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one. Raises ConfigError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}, but torch sees no GPU here; use --device cpu")
    return device


def _encode_shard(worker: EncodeWorker, plan: EncodePlan, out: Path, shard_index: int) -> None:
    """Another task may have made it since this one began, or have died after its tar."""
    if is_committed(out, shard_index, plan) or recover(out, shard_index, plan):
        return
    content = worker.encode_shard(plan, shard_index)
    about = {
        "statistics": measure(content.moments, EncoderIdentity.from_dict(plan.encoder)),
        "failures": [dataclasses.asdict(failure) for failure in worker.open_failures],
    }
    commit(out, shard_index, plan, content, about)
    worker.open_failures = []


def _open_decoder(chosen: EncodeSettings, device: torch.device, *, drop_transparency: bool = False) -> ImageDecoder:
    """`auto`: DALI on the workers' device, or PIL for what only PIL has. `dali-cpu`: DALI beside a GPU."""
    kind = chosen.decoder
    if kind == "auto":
        kind = "pil" if chosen.resize == "adm" else "dali"
    mixed = kind == "dali" and device.type == "cuda"
    background = None if drop_transparency else parse_background(chosen.background)
    return open_decoder(kind.removesuffix("-cpu"), "mixed" if mixed else "cpu", chosen.resize, background)


def _plan(
    shards: str | Path, images: ImageShards, identity: EncoderIdentity, decoder: ImageDecoder, chosen: EncodeSettings
) -> EncodePlan:
    image_size = require_image_size(images, chosen.image_size, identity.downsample)
    return EncodePlan(
        source_folder=redact(str(shards)),
        source_dataset_id=images.manifest.dataset_id,
        count=len(images),
        num_classes=images.manifest.num_classes,
        class_names=images.manifest.class_names,
        samples_per_shard=chosen.samples_per_shard,
        seed=chosen.seed,
        image_size=image_size,
        moments_shape=_moments_shape(identity, image_size),
        encoder=identity.to_dict(),
        decoder=decoder.name,
        resize=decoder.resize,
        precision=chosen.precision,
        flip=chosen.flip,
        versions=_versions(identity, decoder),
        background=background_name(parse_background(chosen.background)),
    )


def _print_plan(plan: EncodePlan, out: Path, tasks: int) -> None:
    stride = ShardLayout.of(1, plan.moments_shape, plan.has_flip).stride
    shape = "x".join(map(str, plan.moments_shape))
    print(f"plan      {plan.plan_id}")
    print(f"samples   {plan.count} of {shape} fp16" + (", and mirrored" if plan.has_flip else ""))
    print(f"shards    {plan.num_shards} of at most {plan.samples_per_shard} samples")
    print(f"bytes     {plan.count * stride / 1e9:.3f} GB, {stride} a sample")
    print(f"decoding  {plan.decoder}, resize {plan.resize}, autoencoder in {plan.precision}")
    print(f"tasks     {tasks}, at most {math.ceil(plan.num_shards / tasks)} shards each; task i of them:")
    print(plan.command(out, 0, tasks).replace("--task 0 ", "--task i "))


def _moments_shape(identity: EncoderIdentity, image_size: int) -> tuple[int, int, int]:
    if image_size > MAX_SIDE:
        raise ConfigError(f"--image-size {image_size} is more than {MAX_SIDE}; take a smaller one")
    side, rest = divmod(image_size, identity.downsample)
    if rest or side < 1:
        raise ConfigError(
            f"--image-size {image_size} is not a positive multiple of {identity.downsample}, the autoencoder's factor; "
            f"take e.g. {max(1, round(image_size / identity.downsample)) * identity.downsample}"
        )
    return (identity.moments_channels, side, side)


def _versions(identity: EncoderIdentity, decoder: ImageDecoder) -> dict[str, str]:
    versions = {"torch": torch.__version__, "decoder": decoder.library}
    return versions if identity.kind == "dct" else {**versions, "diffusers": version("diffusers")}
