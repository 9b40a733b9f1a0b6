"""`ecar-data shard`: images -> WebDataset image shards, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from data_tools.progress import progress
from data_tools.sources import Source, open_source
from ecar_dist.data.atomic import temporary_beside
from ecar_dist.data.manifest import ImageManifest, ShardEntry, write_manifest
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.data.tar_index import index_tar, write_dali_index
from ecar_dist.errors import ConfigError, DataError


def shard(source: str, out: Path, *, holdout: float = 0.0, seed: int = 0, samples_per_shard: int = 10_000) -> None:
    """Write OUT, or with `holdout` in (0, 1) OUT/train and OUT/heldout: disjoint, the same share of every class.

    Raises DataError for an occupied OUT or an unreadable image, ConfigError for a share outside [0, 1).
    """
    if not 0.0 <= holdout < 1.0:
        raise ConfigError(f"--holdout {holdout} is outside [0, 1); give the share of images to hold out, e.g. 0.2")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty; remove it or give another folder")
    images = open_source(source)
    parts = {"": np.arange(len(images.labels))} if holdout == 0.0 else _split(images.labels, holdout, seed)
    working = temporary_beside(out)
    try:
        with progress(len(images.labels), "image", "shard") as bar:
            for name, indices in parts.items():
                _write_part(images, indices, working / name, samples_per_shard, bar)
        os.rename(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{len(indices)} images {name}".strip() for name, indices in parts.items()))


def _split(labels: np.ndarray, holdout: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the two parts, each in source order."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = np.random.default_rng([seed, int(label)]).permutation(members)
        held[chosen[: round(holdout * len(members))]] = True
    if held.all() or not held.any():
        raise ConfigError(f"--holdout {holdout} leaves one part of {len(labels)} images empty; change the share")
    return {"train": np.flatnonzero(~held), "heldout": np.flatnonzero(held)}


def _write_part(images: Source, indices: np.ndarray, folder: Path, samples_per_shard: int, bar: tqdm[Any]) -> None:
    folder.mkdir(parents=True)
    entries: list[ShardEntry] = []
    for first in range(0, len(indices), samples_per_shard):
        chosen = indices[first : first + samples_per_shard]
        entries.append(_write_shard(images, chosen, folder / f"{len(entries):06d}.tar", first, bar))
    manifest = ImageManifest(images.name, len(indices), len(images.class_names), images.class_names, entries)
    write_manifest(folder, manifest)


def _write_shard(images: Source, indices: np.ndarray, path: Path, first: int, bar: tqdm[Any]) -> ShardEntry:
    """Keys are places in the source, so the parts of a split never share one."""
    with webdataset.TarWriter(str(path), encoder=False, user="", group="", mtime=0) as writer:
        for index in indices:
            extension, data = images.read(int(index))
            writer.write({"__key__": f"{index:012d}", extension: data, "cls": str(images.labels[index]).encode()})
            bar.update()
    write_dali_index(path.with_suffix(".idx"), index_tar(path))
    return describe_shard(path, len(indices), first)
