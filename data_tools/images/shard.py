"""`ecar-data shard`: copy images into WebDataset shards. OUT appears only once all is written. Run again to resume.

The bytes of the images are not changed, but every image is decoded once. So bad images are found here, where their file
names are known. The names are stored next to the tars, for later messages.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from data_tools.failures import ERRORS_NAME, MAX_BAD, write_errors
from data_tools.images.index import read_class_names
from data_tools.images.reader import ImageReader, open_images
from data_tools.images.tar_samples import LabelRule, index_image_tar
from data_tools.images.unfinished import FinishedShard, ShardRecords, unfinished_folder
from data_tools.progress import progress
from ecar_dist.data.images.decode import PilDecoder
from ecar_dist.data.images.formats import image_extension
from ecar_dist.data.images.names import NAMES_SUFFIX, readable, write_names
from ecar_dist.data.images.shards import ImageRecord
from ecar_dist.data.images.table import write_table
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.data.shards.manifest import ImageManifest, write_manifest
from ecar_dist.data.shards.tar_index import write_dali_index
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.daemon_pool import DaemonPool

_SHOWN = 10  # bad images named in an error
_EXCESS = 100  # bad images beyond the limit after which the rest of the source is not read
_BATCH = 256  # images; one batch is written while the next is read


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
    """Write OUT; or, with `holdout` in (0, 1), OUT/train and OUT/heldout.

    The two parts are disjoint, and `heldout` gets the share `holdout` of every class; or the images that the source
    itself holds out, if it does. Variants of one picture stay in one part. `shuffle` shuffles each part by `seed`;
    otherwise source order is kept. Images that cannot be decoded are left out and listed in errors.jsonl, up to
    the share `max_bad` of a part. Raises DataError if OUT is occupied, the source cannot be read or too many images are
    bad, ConfigError for settings outside their range.
    """
    check_holdout(holdout)
    if not 0.0 <= max_bad < 1.0:
        raise ConfigError(f"--max-bad {max_bad} is outside [0, 1); give the share of images that may be left out")
    rule = LabelRule.parse(label, read_class_names(classes))
    parts: list[_Part] = []
    checker = PilDecoder()

    with unfinished_folder(out) as working, open_images(source, rule, flat=flat) as images:
        # Which images go to which folder below OUT, and in which order.
        chosen = {"": np.arange(len(images.labels))} if holdout == 0.0 else _split(images, holdout, seed)
        if shuffle:
            chosen = {name: np.random.default_rng(seed).permutation(indices) for name, indices in chosen.items()}

        # Shards that an earlier run has finished are kept, if it had the same source and options.
        options = {"holdout": holdout, "seed": seed, "samples_per_shard": samples_per_shard, "shuffle": shuffle}
        records = ShardRecords(working, {"source": images.identity or images.name, **options})
        with progress(len(images.labels), "image", "shard") as bar:
            for name, indices in chosen.items():
                parts.append(_Part(images, checker, working / name, samples_per_shard, bar))
                parts[-1].write(indices, max_bad, records, name)
        _check_failures(parts)

    bad = sum(len(part.failures) for part in parts)
    notes = f"; {bad} bad images left out, listed in {ERRORS_NAME}" if bad else ""
    if checker.animated:
        notes += f"; {checker.animated} animated or multi-page: the first picture will be used"
    counts = zip((part.count for part in parts), chosen, strict=True)
    print(f"{out}: " + ", ".join(f"{count} images {name}".strip() for count, name in counts) + notes)


def check_holdout(holdout: float) -> None:
    """Raises ConfigError for a share outside [0, 1)."""
    if not 0.0 <= holdout < 1.0:
        raise ConfigError(f"--holdout {holdout} is outside [0, 1); give the share of images to hold out, e.g. 0.2")


def _check_failures(parts: Sequence[_Part]) -> None:
    """Raises DataError if a part has too many bad images. It names those of all parts, to be fixed together."""
    if all(len(part.failures) <= part.allowed and part.count for part in parts):
        return
    errors = [failure["error"] for part in parts for failure in part.failures]
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    raise DataError(
        "; ".join(errors[:_SHOWN]) + f"{more}; bad images: {len(errors)}, --max-bad allows "
        f"{sum(part.allowed for part in parts)}; remove them, or raise --max-bad"
    )


def _split(images: ImageReader, holdout: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the two parts, each in source order. The choice within a class depends on `seed` and the class."""
    labels = images.labels
    held = np.zeros(len(labels), dtype=bool)
    if images.heldout is not None:
        held = images.heldout
    elif images.groups is not None:
        held = _split_groups(labels, images.groups, holdout, seed)
    else:
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            chosen = np.random.default_rng([seed, int(label)]).permutation(members)
            held[chosen[: round(holdout * len(members))]] = True
    if held.all() or not held.any():
        # A share of n images is rounded, so it must be above 1 / 2n.
        least = math.ceil(50 / np.bincount(labels).max() + 1) / 100
        fix = (
            f"give at least {least:g}, or 0 to hold out none"
            if np.bincount(labels).max() > 1 and not held.any()
            else "give another share"
        )
        raise ConfigError(f"--holdout {holdout} puts all {len(labels)} images into one part; {fix}")
    return {"train": np.flatnonzero(~held), "heldout": np.flatnonzero(held)}


def _split_groups(labels: np.ndarray, groups: np.ndarray, holdout: float, seed: int) -> np.ndarray:
    """Which images are held out, bool [count]: whole groups, in random order, up to the share of each class.

    A group belongs to the class of its first image.
    """
    numbers, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    held: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels[first] == label)
        room = round(holdout * sizes[members].sum())
        # A group that is larger than the rest of the share stays in the training part.
        for place in np.random.default_rng([seed, int(label)]).permutation(members):
            if sizes[place] <= room:
                held.append(numbers[place])
                room -= sizes[place]
    return np.isin(groups, held)


class _Part:
    """One folder of shards while it is being written."""

    def __init__(
        self, images: ImageReader, checker: PilDecoder, folder: Path, samples_per_shard: int, bar: tqdm[Any]
    ) -> None:
        self.images = images
        self.checker = checker
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.bar = bar
        self.allowed = 0  # bad images
        self.entries: list[ImageEntry] = []
        self.failures: list[dict[str, Any]] = []

    def write(self, indices: np.ndarray, max_bad: float, records: ShardRecords, name: str) -> None:
        """Write the shards that are not finished, errors.jsonl and the manifest.

        Raises DataError early if far too many images are bad; the caller checks the exact limit over all parts.
        """
        self.allowed = int(max_bad * len(indices))
        self.folder.mkdir(parents=True, exist_ok=True)

        # Those that an earlier run has finished.
        finished = records.finished(name)
        for done in finished:
            self.entries += [done.entry] if done.entry else []
            self.failures += done.failures
            self.checker.animated += done.animated
        images_done = min(len(finished) * self.samples_per_shard, len(indices))
        self.bar.update(images_done)

        # The others. The next batch is decoded ahead, so its animated images may be counted twice after a kill.
        samples = self._read_ahead(indices[images_done:])
        for number in range(len(finished), math.ceil(len(indices) / self.samples_per_shard)):
            failures, animated = len(self.failures), self.checker.animated
            entry = self._write_shard(itertools.islice(samples, self.samples_per_shard))
            self.entries += [entry] if entry else []
            records.add(name, number, FinishedShard(entry, self.failures[failures:], self.checker.animated - animated))

        if self.failures:
            write_errors(self.folder, self.failures)
        names = self.images.class_names
        about = ImageManifest(self.images.name, self.count, len(names), names, self.entries)
        write_manifest(self.folder, dataclasses.replace(about, attribution=self.images.attribution))

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.entries)

    def _write_shard(self, samples: Iterable[tuple[int, ImageRecord, str | None]]) -> ImageEntry | None:
        """None if all images are bad. A key is the index in the source, so the two parts of a split never share one."""
        path = self.folder / f"{len(self.entries):06d}.tar"
        names: list[tuple[str, str]] = []
        with webdataset.TarWriter(str(path), encoder=False, user="", group="", mtime=0) as writer:
            for index, record, fault in samples:
                self.bar.update()
                key = f"{index:012d}"
                extension = image_extension(record.data)
                if fault is not None or extension is None:
                    self._leave_out(index, record, fault or f"image {record.where} has an unknown format")
                    continue
                caption = self.images.captions[index] if self.images.captions else ""
                text = {"txt": caption.encode()} if caption else {}
                writer.write({"__key__": key, extension: record.data, "cls": str(record.label).encode(), **text})
                names.append((key, record.name))

        # A shard with only bad images is not written.
        if not names:
            path.unlink()
            return None
        write_names(path.with_suffix(NAMES_SUFFIX), names)
        return self._describe(path)

    def _describe(self, path: Path) -> ImageEntry:
        tar = index_image_tar(self.folder, path.name, path.stat().st_size, LabelRule("cls"), foreign=False)
        write_dali_index(path.with_suffix(".idx"), tar.members)
        table = path.with_suffix(".npy")
        digest = write_table(table, tar.rows)
        first = sum(entry.count for entry in self.entries)
        return ImageEntry(
            path.name, tar.size, len(tar.rows), first, tar.xxh3_128, tar.sha256, table.name, digest, "tar"
        )

    def _leave_out(self, index: int, record: ImageRecord, error: str) -> None:
        about = {"key": readable(record.key), "shard": readable(record.shard), "name": record.name}
        self.failures.append({"index": index, **about, "error": error})
        if len(self.failures) > self.allowed + _EXCESS:
            _check_failures([self])

    def _read_ahead(self, indices: np.ndarray) -> Iterator[tuple[int, ImageRecord, str | None]]:
        """(index, image, error or None) in the order of the indices. Meanwhile, the next batch is read and decoded."""
        batches = (indices[first : first + _BATCH].tolist() for first in range(0, len(indices), _BATCH))
        with DaemonPool(1, "read-ahead") as pool:
            for batch, records, faults in pool.one_ahead(map(self._read, batches)):
                for place, (index, record) in enumerate(zip(batch, records, strict=True)):
                    yield index, record, faults.get(place)

    def _read(self, batch: list[int]) -> tuple[list[int], list[ImageRecord], dict[int, str]]:
        records = self.images.read_many(batch)
        return batch, records, self.checker.check([record.data for record in records], records)
