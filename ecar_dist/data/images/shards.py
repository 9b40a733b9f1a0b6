"""Random access to labelled encoded images: WebDataset tars and image folders, through the tables of their index.

An image is handed out only where its size, and in tars its hash, are those of the table. That proves exactly what was
read, so no worker has to read a whole tar first; a `ShardStore` proves whole tars on top.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable, Container, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from ecar_dist.data.images.names import read_names, readable
from ecar_dist.data.images.table import MAX_IMAGE_BYTES, UNKNOWN_HASH, decode_table, key_of, largest_table
from ecar_dist.data.shards.manifest import ImageEntry, load_image_manifest
from ecar_dist.data.shards.proof import check_presence
from ecar_dist.data.shards.store import ShardStore
from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import ObjectMissing, Transfer

_READERS = 24  # reads in flight; an object store answers one in 10 to 100 ms


def _unnamed() -> None:
    """Of a record that has no name but its key."""


@dataclass(frozen=True)
class ImageRecord:
    key: str  # of the sample in its tar; the file name in a class directory
    shard: str  # the tar's name, or the directory's
    label: int
    data: bytes  # as encoded by its maker
    find_name: Callable[[], str | None] = field(default=_unnamed, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What the file was called in its source; where nobody wrote that down, the shard and the key. Printable."""
        return self.find_name() or readable(f"{self.shard}/{self.key}")

    @property
    def where(self) -> str:
        """For messages. The name is looked up now: it costs nothing as long as all images are good."""
        name = self.find_name()
        return readable(f"{self.key} ({name}) in {self.shard}" if name else f"{self.key} in {self.shard}")

    def __str__(self) -> str:
        return self.where


class ImageShards:
    """Sample i of a set of images, i in [0, count). Where they are local, presence and sizes are checked at once.

    Raises DataError naming shard and key for whatever is missing, damaged or out of range. With a `store`, whole tars
    come through it; without one, each image is read from its own place. Safe to use from several threads.
    """

    def __init__(self, folder: str | Path, store: ShardStore | None = None) -> None:
        self.manifest = load_image_manifest(folder)
        self._folder, self._home, self._store = folder, self.manifest.home(folder), store
        self._firsts = [entry.first_index for entry in self.manifest.shards]
        self._tables: dict[int, np.ndarray] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._names: dict[int, dict[str, str]] = {}
        self._seen: dict[int, np.ndarray] = {}  # of files in directories: xxh3_64 when first read, 0 before
        self._pool: DaemonPool | None = None
        self._transfer = Transfer()
        self.stats = self._transfer.stats  # of what came from a URL without the store
        if store is None and not remote.is_remote(self._home):
            _check_presence(self._home, self.manifest.shards)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, sample_index: int) -> ImageRecord:
        return self.read_many([sample_index])[0]

    def read_many(self, sample_indices: Sequence[int]) -> list[ImageRecord]:
        """The samples in the order asked, read side by side."""
        places = [self._place(int(index)) for index in sample_indices]
        owners = sorted({owner for owner, _ in places})
        if self._store is not None or len(places) == 1:
            for owner in owners:
                self._prepare(owner)
            return [self._record(*place) for place in places]
        if self._pool is None:
            self._pool = DaemonPool(_READERS, "images")
        try:
            list(self._pool.map(self._prepare, owners))
            return list(self._pool.map(lambda place: self._record(*place), places))
        except CancelledError:
            raise DataError(f"reading {redact(self._home)} was stopped; start again to go on") from None

    def labels(self) -> np.ndarray:
        """int64 [count], from the tables alone."""
        for owner in range(len(self._firsts)):
            self._prepare_table(owner)
        return np.concatenate([self._tables[owner]["label"] for owner in range(len(self._firsts))]).astype(np.int64)

    def forget(self, needed: Container[int]) -> None:
        """Let go of the maps and tables of shards that are not needed soon. Not while another thread reads."""
        self._tables = {owner: table for owner, table in self._tables.items() if owner in needed}
        self._maps = {owner: mapped for owner, mapped in self._maps.items() if owner in needed}
        self._names = {owner: names for owner, names in self._names.items() if owner in needed}

    def close(self) -> None:
        """End the reads from URLs that are underway: they insist for minutes. Safe to call twice."""
        self._transfer.stopping.set()
        if self._pool is not None:
            self._pool.end()

    def _place(self, sample_index: int) -> tuple[int, int]:
        """Shard, and row in its table."""
        if not 0 <= sample_index < len(self):
            raise DataError(f"{self._folder}: sample {sample_index} is outside 0..{len(self) - 1}; ask for one inside")
        owner = bisect.bisect_right(self._firsts, sample_index) - 1
        return owner, sample_index - self._firsts[owner]

    def _prepare(self, owner: int) -> None:
        self._prepare_table(owner)
        if self._store is not None and self.manifest.shards[owner].kind == "tar" and owner not in self._maps:
            self._maps[owner] = self._store.open(owner)

    def _prepare_table(self, owner: int) -> None:
        if owner not in self._tables:
            entry = self.manifest.shards[owner]
            where = remote.join(self._folder, entry.table)
            data = remote.read_bytes(where, self._transfer, limit=largest_table(entry.count))
            self._tables[owner] = decode_table(data, entry, self.manifest.num_classes, redact(where))

    def _record(self, owner: int, row: int) -> ImageRecord:
        entry, place = self.manifest.shards[owner], self._tables[owner][row]
        key, start, stop = key_of(place), int(place["offset"]), int(place["offset"]) + int(place["size"])
        mapped = self._maps.get(owner)
        if mapped is None:
            data = self._read(entry, key, start, stop)
        else:  # of a file that was cut, a map has no bytes to read, and to touch it ends the process
            data = mapped[start:stop] if mapped.size() >= stop else b""
        if len(data) != stop - start:
            raise self._wrong(owner, key, start, "bytes", len(data), stop - start)
        expected, found = int(place["xxh3_64"]), xxhash.xxh3_64_intdigest(data)
        if expected == UNKNOWN_HASH:  # nobody read it when it was indexed: the first reading counts
            seen = self._seen.setdefault(owner, np.zeros(entry.count, np.uint64))
            expected = int(seen[row]) or found
            seen[row] = expected
        if found != expected:
            raise self._wrong(owner, key, start, "xxh3_64", f"{found:016x}", f"{expected:016x}")
        find_name = partial(self._name, owner, key) if entry.kind == "tar" else _unnamed
        return ImageRecord(key, entry.name, int(place["label"]), data, find_name)

    def _name(self, owner: int, key: str) -> str | None:
        if owner not in self._names:
            self._names[owner] = read_names(self._home, self.manifest.shards[owner].name, self._transfer)
        return self._names[owner].get(key)

    def _read(self, entry: ImageEntry, key: str, start: int, stop: int) -> bytes:
        """A range of a tar; a file in a directory whole, so that one that has grown is noticed."""
        where = remote.join(self._home, entry.name)
        if entry.kind == "files":
            return self._read_file(remote.join(where, key), stop)
        if remote.is_remote(where):
            return remote.read_range(where, start, stop, self._transfer) if stop > start else b""
        return _read_local(where, start, stop)

    def _read_file(self, path: str, size: int) -> bytes:
        try:
            if remote.is_remote(path):
                return remote.read_object(path, size, self._transfer)
            return remote.read_bytes(path, limit=MAX_IMAGE_BYTES)
        except ObjectMissing:
            raise DataError(
                f"{readable(redact(path))} does not exist, but {redact(str(self._folder))} lists it: the index is out "
                f"of date; restore the file, or run `ecar-data index {redact(self.manifest.source)} OUT` again"
            ) from None

    def _wrong(self, owner: int, key: str, offset: int, what: str, found: object, expected: object) -> DataError:
        entry = self.manifest.shards[owner]
        store = self._store if entry.kind == "tar" else None
        where = store.where(owner) if store else redact(remote.join(self._home, entry.name))
        # a file in a directory has no hash in its table
        says = "when it was first read" if entry.kind == "files" and what != "bytes" else "its table says"
        return DataError(
            f"{where}: image {key} at byte {offset} has {what} {found}, {says} {expected}; restore it, or run "
            f"`{self.manifest.MADE_BY}` again"
        )


def _read_local(path: str, start: int, stop: int) -> bytes:
    """Opened for each read: a set may have more tars than a process may hold files, and no fork shares a place."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)
    except OSError as error:
        raise DataError(f"cannot read shard {path} ({error.strerror}); restore it") from None


def _check_presence(home: str | Path, entries: Sequence[ImageEntry]) -> None:
    check_presence(home, [entry for entry in entries if entry.kind == "tar"])
    for entry in entries:
        if entry.kind == "files" and not (folder := remote.file_in(home, entry.name)).is_dir():
            raise DataError(f"class directory {folder} is missing, the manifest lists it; restore it")
