"""`ecar-data shard`: images -> WebDataset image shards of our own, whole or not at all.

Bytes are copied as they are, but every image is decoded once, so that a bad one is found here, where its file's name is
known, and not by whoever uses the shards. The names travel beside the tars, for later messages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from data_tools.encode.failures import ERRORS_NAME, MAX_BAD
from data_tools.images.index import new_folder, read_class_names
from data_tools.images.reader import ImageReader, open_images
from data_tools.images.tar_samples import LabelRule, index_image_tar
from data_tools.progress import progress
from ecar_dist.data.images.decode import PilDecoder
from ecar_dist.data.images.formats import image_extension
from ecar_dist.data.images.names import NAMES_SUFFIX, readable, write_names
from ecar_dist.data.images.shards import ImageRecord
from ecar_dist.data.images.table import write_table
from ecar_dist.data.shards.manifest import ImageEntry, ImageManifest, write_manifest
from ecar_dist.data.shards.tar_index import write_dali_index
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.daemon_pool import DaemonPool

_SHOWN = 10  # bad images in an error
_MORE = 100  # bad images past the bound: then the source is not worth reading to its end
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
    flat: bool = False,
) -> None:
    """Write OUT, or with `holdout` in (0, 1) OUT/train and OUT/heldout: disjoint, the same share of every class.

    `shuffle` mixes each part by `seed`; otherwise source order is kept. Images that cannot be decoded are left out and
    listed in errors.jsonl, up to the share `max_bad` of a part. Raises DataError for an occupied OUT, an unreadable
    source or too many bad images, ConfigError for settings outside their range.
    """
    if not 0.0 <= holdout < 1.0:
        raise ConfigError(f"--holdout {holdout} is outside [0, 1); give the share of images to hold out, e.g. 0.2")
    if not 0.0 <= max_bad < 1.0:
        raise ConfigError(f"--max-bad {max_bad} is outside [0, 1); give the share of images that may be left out")
    rule = LabelRule.parse(label, read_class_names(classes))
    parts: list[_Part] = []
    checker = PilDecoder()
    with new_folder(out) as working, open_images(source, rule, flat=flat) as images:
        chosen = {"": np.arange(len(images.labels))} if holdout == 0.0 else _split(images.labels, holdout, seed)
        if shuffle:
            chosen = {name: np.random.default_rng(seed).permutation(indices) for name, indices in chosen.items()}
        with progress(len(images.labels), "image", "shard") as bar:
            for name, indices in chosen.items():
                parts.append(_Part(images, checker, working / name, samples_per_shard, bar))
                parts[-1].write(indices, max_bad)
        _check_failures(parts)
    bad = sum(len(part.failures) for part in parts)
    notes = f"; {bad} bad images left out, listed in {ERRORS_NAME}" if bad else ""
    if checker.animated:
        notes += f"; {checker.animated} animated or with several pages: the first picture will be used"
    counts = zip((part.count for part in parts), chosen, strict=True)
    print(f"{out}: " + ", ".join(f"{count} images {name}".strip() for count, name in counts) + notes)


def _check_failures(parts: Sequence[_Part]) -> None:
    """Raises DataError where a part has too many bad images, with those of all parts: whoever repairs them wants to do
    so once."""
    if all(len(part.failures) <= part.allowed and part.count for part in parts):
        return
    errors = [failure["error"] for part in parts for failure in part.failures]
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    raise DataError(
        "; ".join(errors[:_SHOWN]) + f"{more}; bad images: {len(errors)}, --max-bad allows "
        f"{sum(part.allowed for part in parts)}; remove them, or raise --max-bad"
    )


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

    def __init__(
        self, images: ImageReader, checker: PilDecoder, folder: Path, samples_per_shard: int, bar: tqdm[Any]
    ) -> None:
        self.images, self.checker, self.folder = images, checker, folder
        self.samples_per_shard, self.bar, self.allowed = samples_per_shard, bar, 0
        self.entries: list[ImageEntry] = []
        self.failures: list[dict[str, Any]] = []

    def write(self, indices: np.ndarray, max_bad: float) -> None:
        """Raises DataError where more images are bad than any list should have; `_check_failures` for fewer."""
        self.allowed = int(max_bad * len(indices))
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = self._read_ahead(indices)
        for _ in range(0, len(indices), self.samples_per_shard):
            self._write_shard(itertools.islice(samples, self.samples_per_shard))
        if self.failures:
            with atomic_write(self.folder / ERRORS_NAME) as file:
                file.write("".join(json.dumps(failure, sort_keys=True) + "\n" for failure in self.failures).encode())
        names = self.images.class_names
        write_manifest(self.folder, ImageManifest(self.images.name, self.count, len(names), names, self.entries))

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.entries)

    def _write_shard(self, samples: Iterable[tuple[int, ImageRecord, str | None]]) -> None:
        """Keys are places in the source, so the parts of a split never share one."""
        path = self.folder / f"{len(self.entries):06d}.tar"
        names: list[tuple[str, str]] = []
        with webdataset.TarWriter(str(path), encoder=False, user="", group="", mtime=0) as writer:
            for index, record, fault in samples:
                self.bar.update()
                extension, key = image_extension(record.data), f"{index:012d}"
                if fault is not None or extension is None:
                    self._leave_out(index, record, fault or f"image {record.where} has an unknown format")
                    continue
                writer.write({"__key__": key, extension: record.data, "cls": str(record.label).encode()})
                names.append((key, record.name))
        if names:
            write_names(path.with_suffix(NAMES_SUFFIX), names)
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

    def _leave_out(self, index: int, record: ImageRecord, error: str) -> None:
        about = {"key": readable(record.key), "shard": readable(record.shard), "name": record.name}
        self.failures.append({"index": index, **about, "error": error})
        if len(self.failures) > self.allowed + _MORE:
            _check_failures([self])

    def _read_ahead(self, indices: np.ndarray) -> Iterator[tuple[int, ImageRecord, str | None]]:
        """Images in the order of the indices, with what is wrong with each.

        While the caller works on a batch, the next one is read and decoded.
        """
        batches = (indices[first : first + _BATCH].tolist() for first in range(0, len(indices), _BATCH))
        with DaemonPool(1, "read-ahead") as pool:
            for batch, records, faults in pool.one_ahead(map(self._read, batches)):
                for place, (index, record) in enumerate(zip(batch, records, strict=True)):
                    yield index, record, faults.get(place)

    def _read(self, batch: list[int]) -> tuple[list[int], list[ImageRecord], dict[int, str]]:
        records = self.images.read_many(batch)
        return batch, records, self.checker.check([record.data for record in records], records)
