"""`ecar-data shard`: images -> WebDataset image shards of our own, whole or not at all.

Bytes are copied as they are. Only the first bytes of an image are looked at, to name its format: decoding 1.28 million
images to find the broken ones takes hours, and encoding does it anyway.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from data_tools.failures import ERRORS_NAME, MAX_BAD
from data_tools.image_reader import ImageReader, image_extension, open_images
from data_tools.index import new_folder, read_class_names
from data_tools.progress import progress
from data_tools.tar_samples import LabelRule, index_image_tar
from ecar_dist.data.image_shards import ImageRecord
from ecar_dist.data.image_table import write_table
from ecar_dist.data.manifest import ImageEntry, ImageManifest, write_manifest
from ecar_dist.data.tar_index import write_dali_index
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import atomic_write, naming
from ecar_dist.storage.daemon_pool import DaemonPool

_BATCH = 256  # images in memory: one batch is written while the next is read


def shard(
    source: str,
    out: Path,
    *,
    holdout: float = 0.0,
    seed: int = 0,
    samples_per_shard: int = 10_000,
    shuffle: bool = False,
    max_bad: float = MAX_BAD,
    label: str = "cls",
    classes: Path | None = None,
) -> None:
    """Write OUT, or with `holdout` in (0, 1) OUT/train and OUT/heldout: disjoint, the same share of every class.

    `shuffle` mixes each part by `seed`; otherwise source order is kept. Files of no known image format are left out
    and listed in errors.jsonl, up to the share `max_bad` of a part. Raises DataError for an occupied OUT, an unreadable
    source or too many such files, ConfigError for settings outside their range.
    """
    if not 0.0 <= holdout < 1.0:
        raise ConfigError(f"--holdout {holdout} is outside [0, 1); give the share of images to hold out, e.g. 0.2")
    if not 0.0 <= max_bad < 1.0:
        raise ConfigError(f"--max-bad {max_bad} is outside [0, 1); give the share of images that may be left out")
    rule = LabelRule.parse(label, read_class_names(classes))
    counts = {}
    with new_folder(out) as working, open_images(source, rule) as images:
        parts = {"": np.arange(len(images.labels))} if holdout == 0.0 else _split(images.labels, holdout, seed)
        if shuffle:
            parts = {name: np.random.default_rng(seed).permutation(indices) for name, indices in parts.items()}
        with progress(len(images.labels), "image", "shard") as bar:
            for name, indices in parts.items():
                counts[name] = _Part(images, working / name, samples_per_shard, bar).write(indices, max_bad)
    print(f"{out}: " + ", ".join(f"{count} images {name}".strip() for name, count in counts.items()))


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


class _Part:
    """One folder of shards on its way."""

    def __init__(self, images: ImageReader, folder: Path, samples_per_shard: int, bar: tqdm[Any]) -> None:
        self.images, self.folder, self.samples_per_shard, self.bar = images, folder, samples_per_shard, bar
        self.entries: list[ImageEntry] = []
        self.failures: list[dict[str, Any]] = []

    def write(self, indices: np.ndarray, max_bad: float) -> int:
        """The number of images written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = _read_ahead(self.images, indices)
        for _ in range(0, len(indices), self.samples_per_shard):
            self._write_shard(itertools.islice(samples, self.samples_per_shard), int(max_bad * len(indices)))
        if self.failures:
            with atomic_write(self.folder / ERRORS_NAME) as file:
                file.write("".join(json.dumps(failure, sort_keys=True) + "\n" for failure in self.failures).encode())
        count, names = sum(entry.count for entry in self.entries), self.images.class_names
        if not count:
            raise DataError(f"{self.images.name}: no image of {len(indices)} is of a known format; check the source")
        write_manifest(self.folder, ImageManifest(self.images.name, count, len(names), names, self.entries))
        return count

    def _write_shard(self, samples: Iterable[tuple[int, ImageRecord]], allowed: int) -> None:
        """Keys are places in the source, so the parts of a split never share one."""
        path, written = self.folder / f"{len(self.entries):06d}.tar", 0
        with naming(path), webdataset.TarWriter(str(path), encoder=False, user="", group="", mtime=0) as writer:
            for index, record in samples:
                self.bar.update()
                extension = image_extension(record.data)
                if extension is None:
                    self._leave_out(index, record, allowed)
                    continue
                writer.write({"__key__": f"{index:012d}", extension: record.data, "cls": str(record.label).encode()})
                written += 1
        if written:
            self.entries.append(self._describe(path))
        else:
            path.unlink()

    def _describe(self, path: Path) -> ImageEntry:
        tar = index_image_tar(self.folder, path.name, path.stat().st_size, LabelRule("cls"), foreign=False)
        write_dali_index(path.with_suffix(".idx"), tar.members)
        table = path.with_suffix(".npy")
        digest = write_table(table, tar.rows)
        first = sum(entry.count for entry in self.entries)
        hashes = tar.xxh3_128, tar.sha256
        return ImageEntry(path.name, tar.size, len(tar.rows), first, *hashes, table.name, digest, "tar")

    def _leave_out(self, index: int, record: ImageRecord, allowed: int) -> None:
        error = f"no known image format in its first bytes ({record.data[:4].hex()})"
        self.failures.append({"index": index, "key": record.key, "shard": record.shard, "error": error})
        if len(self.failures) > allowed:
            raise DataError(
                f"image {record.where} cannot be read ({error}); bad images so far: {len(self.failures)}, --max-bad "
                f"allows {allowed}; remove them, or raise --max-bad"
            )


def _read_ahead(images: ImageReader, indices: np.ndarray) -> Iterator[tuple[int, ImageRecord]]:
    """Images in the order of the indices; while the caller works on a batch, the next one is read."""
    batches = (indices[first : first + _BATCH].tolist() for first in range(0, len(indices), _BATCH))
    with DaemonPool(1, "read-ahead") as pool:
        for batch, records in pool.one_ahead((batch, images.read_many(batch)) for batch in batches):
            yield from zip(batch, records, strict=True)
