"""Random access to labelled encoded images in WebDataset tars or image folders, through the tables of their index.

Each image is checked when it is read: its size, and in tars its hash, must match the table. So no worker has to read a
complete tar before its first image. With a `ShardStore`, complete tars are proven too.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from ecar_dist.data.images.names import read_names, readable
from ecar_dist.data.images.table import MAX_IMAGE_BYTES, UNKNOWN_HASH, decode_table, key_of, largest_table
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.data.shards.proof import ProvenMap, check_presence
from ecar_dist.data.shards.store import ShardStore
from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import ObjectMissing, Transfer

TABLE_BYTES = 1 << 30  # of tables that are kept in memory: 30 million images
_READERS = 24  # reads in flight; an object store answers one in 10 to 100 ms
_TOGETHER = 2 << 20  # bytes of a tar in one read of several images
_GAP = 1 << 16  # bytes between two images that are read and discarded, to save a read


@dataclass(frozen=True)
class ImageRecord:
    """One encoded image. Its original name is looked up on demand, because only messages need it."""

    key: str  # of the sample in its tar; in a class directory, the file name
    shard: str  # name of the tar or of the class directory
    label: int
    data: bytes  # the image file
    find_name: Callable[[], str | None] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The original file name, or shard and key if it is not known. Printable."""
        return self._found_name() or readable(f"{self.shard}/{self.key}")

    @property
    def where(self) -> str:
        """The image in messages: key, original file name if known, shard."""
        name = self._found_name()
        return readable(f"{self.key} ({name}) in {self.shard}" if name else f"{self.key} in {self.shard}")

    def __str__(self) -> str:
        return self.where

    def _found_name(self) -> str | None:
        return None if self.find_name is None else self.find_name()


@dataclass
class _Span:
    """Images of one shard that are read together: their rows, and the range of bytes that contains them."""

    shard: int
    rows: list[int]
    start: int
    stop: int


class ImageShards:
    """The samples [0, count) of a set of images. Safe to use from several threads.

    With a `store`, tars are read through it. Without one, each image is read from its tar or file directly. For a local
    set, the constructor checks that all tars and class directories exist.

    Raises DataError that names shard and key for an image that is missing, damaged or out of range.
    """

    def __init__(self, folder: str | Path, store: ShardStore[ProvenMap] | None = None) -> None:
        self.manifest = load_image_manifest(folder)
        self._folder = folder
        self._home = self.manifest.home(folder)
        self._store = store
        self._first_index = [entry.first_index for entry in self.manifest.shards]

        # By shard index, filled when first needed.
        self._tables: dict[int, np.ndarray] = {}  # at most TABLE_BYTES, see `_trim`
        self._trimming = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}  # of tars in the store
        self._names: dict[int, dict[str, str]] = {}
        self._first_hashes: dict[int, np.ndarray] = {}  # for files in directories: xxh3_64 of the first read, or 0

        self._pool: DaemonPool | None = None
        self._transfer = Transfer()
        self.stats = self._transfer.stats  # of reads from a URL without the store
        if store is None and not remote.is_remote(self._home):
            _check_presence(self._home, self.manifest.shards)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, sample_index: int) -> ImageRecord:
        return self.read_many([sample_index])[0]

    def read_many(self, sample_indices: Sequence[int]) -> list[ImageRecord]:
        """The samples in this order, read in parallel. Images that follow each other in a tar are read together."""
        locations = [self._locate(int(index)) for index in sample_indices]
        shards = sorted({shard for shard, _ in locations})

        # Maps from the store need no threads.
        self._trim()
        if self._store is not None or len(locations) == 1:
            for shard in shards:
                self._prepare(shard)
            return [self._record(*location) for location in locations]

        if self._pool is None:
            self._pool = DaemonPool(_READERS, "images")
        try:
            list(self._pool.map(self._prepare, shards))
            found = list(self._pool.map(self._read_span, self._spans(locations)))
            return list(itertools.chain.from_iterable(found))
        except CancelledError:
            raise DataError(f"reading {redact(self._home)} was stopped; start again to continue") from None

    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [count]. Reads only the tables."""
        labels = np.empty(len(self), dtype=np.int64)
        for shard, first in enumerate(self._first_index):
            found = self._table(shard)["label"]
            labels[first : first + len(found)] = found
            self._trim()
        return labels

    def forget(self, needed: Container[int]) -> None:
        """Release the maps and tables of all shards except `needed`. Do not call it while another thread reads."""
        self._tables = {shard: table for shard, table in self._tables.items() if shard in needed}
        self._maps = {shard: mapped for shard, mapped in self._maps.items() if shard in needed}
        self._names = {shard: names for shard, names in self._names.items() if shard in needed}

    def close(self) -> None:
        """Stop the reads from URLs, which may otherwise be retried for minutes. Safe to call twice."""
        self._transfer.stopping.set()
        if self._pool is not None:
            self._pool.end()

    def _locate(self, sample_index: int) -> tuple[int, int]:
        """Shard of a sample, and its row in the table of the shard."""
        if not 0 <= sample_index < len(self):
            raise DataError(f"sample {sample_index} of {self._folder} does not exist; give one in 0..{len(self) - 1}")
        shard = bisect.bisect_right(self._first_index, sample_index) - 1
        return shard, sample_index - self._first_index[shard]

    def _prepare(self, shard: int) -> None:
        """Read the table of a shard, and open its tar if there is a store."""
        self._table(shard)
        if self._store is not None and self.manifest.shards[shard].kind == "tar" and shard not in self._maps:
            self._maps[shard] = self._store.open(shard)

    def _table(self, shard: int) -> np.ndarray:
        """The table of a shard. It is read again if another thread has released it."""
        table = self._tables.get(shard)
        if table is None:
            entry = self.manifest.shards[shard]
            where = remote.join(self._folder, entry.table)
            data = remote.read_bytes(where, self._transfer, limit=largest_table(entry.count))
            table = decode_table(data, entry, self.manifest.num_classes, redact(where))
            self._tables[shard] = table
        return table

    def _trim(self) -> None:
        """Keep at most TABLE_BYTES of tables. Releases those read first: an index of 10^9 images has 33 GB of them."""
        with self._trimming:
            tables = list(self._tables.items())
            total = sum(table.nbytes for _, table in tables)
            for shard, table in tables:
                if total <= TABLE_BYTES:
                    return
                self._tables.pop(shard, None)
                total -= table.nbytes

    def _range(self, shard: int, row: int) -> tuple[int, int]:
        """Where an image begins and ends in its tar."""
        columns = self._table(shard)[row]
        start = int(columns["offset"])
        return start, start + int(columns["size"])

    def _spans(self, locations: Sequence[tuple[int, int]]) -> list[_Span]:
        """The images as spans, in order. A span ends where the next image is farther away, or at _TOGETHER bytes."""
        spans: list[_Span] = []
        for shard, row in locations:
            start, stop = self._range(shard, row)
            last = spans[-1] if spans and spans[-1].shard == shard else None
            near = last is not None and last.stop <= start <= last.stop + _GAP and stop - last.start <= _TOGETHER
            if last is not None and near and self.manifest.shards[shard].kind == "tar":
                last.rows.append(row)
                last.stop = stop
            else:
                spans.append(_Span(shard, [row], start, stop))
        return spans

    def _read_span(self, span: _Span) -> list[ImageRecord]:
        if len(span.rows) == 1:
            return [self._record(span.shard, span.rows[0])]
        data = self._read_tar(self.manifest.shards[span.shard], span.start, span.stop)
        records = []
        for row in span.rows:
            start, stop = self._range(span.shard, row)
            records.append(self._proven(span.shard, row, data[start - span.start : stop - span.start]))
        return records

    def _record(self, shard: int, row: int) -> ImageRecord:
        """Read and check one image. Its shard must be prepared."""
        entry = self.manifest.shards[shard]
        start, stop = self._range(shard, row)
        mapped = self._maps.get(shard)
        if mapped is not None:
            # Reading a map past the end of a truncated file would kill the process with SIGBUS.
            data = mapped[start:stop] if mapped.size() >= stop else b""
        elif entry.kind == "tar":
            data = self._read_tar(entry, start, stop)
        else:
            folder = remote.join(self._home, entry.name)
            data = self._read_file(remote.join(folder, key_of(self._table(shard)[row])), stop)
        return self._proven(shard, row, data)

    def _proven(self, shard: int, row: int, data: bytes) -> ImageRecord:
        """The record of an image. Raises DataError if `data` does not match the table."""
        entry = self.manifest.shards[shard]
        columns = self._table(shard)[row]
        key = key_of(columns)
        start = int(columns["offset"])
        size = int(columns["size"])
        if len(data) != size:
            raise self._wrong(shard, key, start, "bytes", len(data), size)

        # If indexing did not read the file, later reads must have the hash of the first read.
        expected = int(columns["xxh3_64"])
        found = xxhash.xxh3_64_intdigest(data)
        if expected == UNKNOWN_HASH:
            first_hashes = self._first_hashes.setdefault(shard, np.zeros(entry.count, np.uint64))
            expected = int(first_hashes[row]) or found
            first_hashes[row] = expected
        if found != expected:
            raise self._wrong(shard, key, start, "xxh3_64", f"{found:016x}", f"{expected:016x}")

        find_name = partial(self._name, shard, key) if entry.kind == "tar" else None
        return ImageRecord(key, entry.name, int(columns["label"]), data, find_name)

    def _name(self, shard: int, key: str) -> str | None:
        """The original file name of a sample; None if it is not known."""
        if shard not in self._names:
            self._names[shard] = read_names(self._home, self.manifest.shards[shard].name, self._transfer)
        return self._names[shard].get(key)

    def _read_tar(self, entry: ImageEntry, start: int, stop: int) -> bytes:
        where = remote.join(self._home, entry.name)
        if remote.is_remote(where):
            return remote.read_range(where, start, stop, self._transfer) if stop > start else b""
        return _read_local(where, start, stop)

    def _read_file(self, path: str, size: int) -> bytes:
        """A complete file. If it has grown, the result is longer than `size`."""
        try:
            if remote.is_remote(path):
                return remote.read_object(path, size, self._transfer)
            return remote.read_bytes(path, limit=MAX_IMAGE_BYTES)
        except ObjectMissing:
            raise DataError(
                f"{readable(redact(path))} does not exist, but {redact(str(self._folder))} lists it: the index is out "
                f"of date; restore the file, or run `ecar-data index {redact(self.manifest.source)} OUT` again"
            ) from None

    def _wrong(self, shard: int, key: str, offset: int, what: str, found: object, expected: object) -> DataError:
        entry = self.manifest.shards[shard]
        store = self._store if entry.kind == "tar" else None
        where = store.where(shard) if store else redact(remote.join(self._home, entry.name))
        says = "when it was first read" if entry.kind == "files" and what != "bytes" else "its table says"
        return DataError(
            f"{where}: image {key} at byte {offset} has {what} {found}, {says} {expected}; restore it, or run "
            f"`{self.manifest.MADE_BY}` again"
        )


def _read_local(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. It is opened for each read: there may be more tars than file descriptors, and
    forked processes would share the position in an open file."""
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
            raise DataError(f"class directory {folder} is missing, but the manifest lists it; restore it")
