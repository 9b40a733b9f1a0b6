"""`ecar-data encode`: image shards -> latent shards. Resumable, and split over any number of tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_tools.encode_plan import EncodePlan, settle_plan
from data_tools.moments_statistics import measure
from data_tools.progress import progress
from ecar_dist.data.image_shards import ImageRecord, ImageShards
from ecar_dist.data.images import ImageDecoder, open_decoder
from ecar_dist.data.shard_writer import ShardContent, write_latent_shard
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec
from ecar_dist.vae.pixels import from_pixels

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FP16_MAX = float(np.finfo(np.float16).max)


def encode(
    shards: Path,
    out: Path,
    *,
    vae: str,
    image_size: int,
    task: int = 0,
    tasks: int = 1,
    samples_per_shard: int = 4096,
    seed: int = 0,
    batch_size: int = 64,
    decoder: str = "dali",
    device: str = "auto",
    precision: str = "fp32",
    flip: str = "none",
) -> None:
    """Make the shards task, task + tasks, ... of the plan that lack a marker.

    Raises DataError for bad images or an occupied OUT, ConfigError for settings that do not fit.
    """
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is outside 0..{tasks - 1} for --tasks {tasks}; count tasks from 0")
    target = torch.device(resolve_device(device))
    images = ImageShards(shards)
    codec = open_codec_by_spec(vae, target, _PRECISIONS[precision])
    image_decoder = open_decoder(decoder, "mixed" if decoder == "dali" and target.type == "cuda" else "cpu")
    shape = _moments_shape(codec.identity, image_size)
    plan = settle_plan(
        out,
        EncodePlan(
            source_folder=str(shards),
            source_dataset_id=images.manifest.dataset_id,
            count=len(images),
            num_classes=images.manifest.num_classes,
            class_names=images.manifest.class_names,
            samples_per_shard=samples_per_shard,
            seed=seed,
            image_size=image_size,
            moments_shape=shape,
            encoder=codec.identity.to_dict(),
            decoder=image_decoder.name,
            precision=precision,
            flip=flip,
            versions=_versions(codec.identity, image_decoder),
        ),
    )
    todo = [index for index in range(task, plan.num_shards, tasks) if not is_committed(out, index, plan)]
    with progress(sum(len(plan.rows(index)) for index in todo), "image", "encode") as bar:
        worker = _Worker(images, image_decoder, codec, target, batch_size, bar)
        for index in todo:
            _encode_shard(worker, plan, out, index)
    print(
        f"{out}: task {task} of {tasks} wrote {len(todo)} of {plan.num_shards} shards; next: ecar-data finalize {out}"
    )


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def is_committed(out: Path, shard_index: int, plan: EncodePlan) -> bool:
    """True if the marker is there, is of this plan, and the tar has the size it states."""
    marker = read_marker(out, shard_index)
    path = out / f"{shard_index:06d}.tar"
    return (
        marker is not None
        and marker["plan_id"] == plan.plan_id
        and path.exists()
        and path.stat().st_size == marker["entry"]["bytes"]
        and path.with_suffix(".idx").exists()
    )


def read_marker(out: Path, shard_index: int) -> dict[str, Any] | None:
    """A marker that is no JSON proves nothing, so it counts as none."""
    try:
        return json.loads((out / f"{shard_index:06d}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


class _Worker:
    """Images in, moments out: what encoding one shard needs and no shard owns."""

    def __init__(
        self,
        images: ImageShards,
        decoder: ImageDecoder,
        codec: LatentCodec,
        device: torch.device,
        batch_size: int,
        bar: tqdm[Any],
    ) -> None:
        self.images, self.decoder, self.codec = images, decoder, codec
        self.device, self.batch_size, self.bar = device, batch_size, bar

    def moments(self, records: list[ImageRecord], image_size: int, mirrored: bool) -> np.ndarray:
        """Raw moments fp16 [B, *shape]. Raises DataError naming the image whose moments fp16 cannot hold."""
        keys = [record.where for record in records]
        pixels = self.decoder.decode_to_batch([record.data for record in records], keys, image_size)
        batch = from_pixels(torch.from_numpy(pixels).to(self.device))  # bytes travel, floats do not
        raw = self.codec.encode(batch.flip(-1) if mirrored else batch).cpu().numpy()
        bad = ~(np.abs(raw) <= _FP16_MAX).reshape(len(records), -1).all(axis=1)  # a NaN compares false
        if bad.any():
            where = keys[int(bad.argmax())]
            raise DataError(
                f"moments of image {where} are not finite in fp16 (limit {_FP16_MAX:.0f}); check the autoencoder"
            )
        return raw.astype(np.float16)

    def batches(self, indices: np.ndarray) -> Iterator[list[ImageRecord]]:
        for first in range(0, len(indices), self.batch_size):
            yield [self.images.read(int(index)) for index in indices[first : first + self.batch_size]]


def _encode_shard(worker: _Worker, plan: EncodePlan, out: Path, shard_index: int) -> None:
    straight, mirrored, labels = [], [], []
    for records in worker.batches(plan.source_indices(shard_index)):
        straight.append(worker.moments(records, plan.image_size, mirrored=False))
        if plan.has_flip:
            mirrored.append(worker.moments(records, plan.image_size, mirrored=True))
        labels += [record.label for record in records]
        worker.bar.update(len(records))
    moments = np.concatenate(straight)
    flipped = np.concatenate(mirrored) if mirrored else None
    content = ShardContent(plan.rows(shard_index).start, moments, np.array(labels, dtype=np.int64), flipped)
    statistics = measure(moments, EncoderIdentity.from_dict(plan.encoder))
    description = {"encoder": plan.encoder, "plan_id": plan.plan_id}
    write_latent_shard(out, shard_index, content, description, {"plan_id": plan.plan_id, "statistics": statistics})


def _moments_shape(identity: EncoderIdentity, image_size: int) -> tuple[int, int, int]:
    side, rest = divmod(image_size, identity.downsample)
    if rest or side < 1:
        raise ConfigError(
            f"--image-size {image_size} is not a multiple of {identity.downsample}, the autoencoder's factor"
        )
    return (identity.moments_channels, side, side)


def _versions(identity: EncoderIdentity, decoder: ImageDecoder) -> dict[str, str]:
    versions = {"torch": torch.__version__, "decoder": decoder.library}
    return {**versions, "diffusers": version("diffusers")} if identity.kind == "kl" else versions
