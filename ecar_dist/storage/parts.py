"""Hashes of the parts of a file, so that a reader can verify the ranges that it reads without the rest of the file.

    part k    bytes [start + k size, start + (k + 1) size) of the file; the last part may be shorter
    table     the xxh3_128 of each part, 16 bytes each, one after the other

The reader must verify the table before using it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.fetch import RANGE_BYTES, THREADS, RemoteFile, WrongContentError, stat_sized
from ecar_dist.storage.remote import read_range
from ecar_dist.storage.retries import Transfer

DIGEST_BYTES = 16
_AT_ONCE = 2 * THREADS  # requests whose bodies are in memory at the same time
_ATTEMPTS = 2  # downloads of a part before a wrong hash is an error


def table_bytes(total: int, size: int) -> int:
    """The length of the table of `total` bytes in parts of `size`."""
    return -(-total // size) * DIGEST_BYTES


class PartHasher:
    """Computes the table of a stream of bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._room = size  # bytes that the current part still takes
        self._digest = xxhash.xxh3_128()
        self._table = bytearray()

    def update(self, block: memoryview) -> None:
        for start in _cuts(len(block), self._room, self.size):
            piece = block[start : start + self._room]
            self._digest.update(piece)
            self._room -= len(piece)
            if not self._room:
                self._close_part()

    def table(self) -> bytes:
        """The table of all bytes so far. Closes the last part."""
        if self._room < self.size:
            self._close_part()
        return bytes(self._table)

    def _close_part(self) -> None:
        self._table += self._digest.digest()
        self._digest.reset()
        self._room = self.size


def _cuts(length: int, first: int, size: int) -> Iterator[int]:
    """Where the pieces of a block begin: the first has at most `first` bytes, each other at most `size`."""
    if length:
        yield 0
    yield from range(first, length, size)


@dataclass(frozen=True)
class PartTable:
    """The verified hashes of the parts of bytes [start, stop) of a file."""

    start: int
    stop: int
    size: int  # of a part
    digests: bytes

    def parts_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The parts that overlap these ranges [low, high) of the file, in increasing order."""
        found: set[int] = set()
        for low, high in ranges:
            found.update(range((low - self.start) // self.size, -(-(high - self.start) // self.size)))
        return sorted(found)

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """The byte range in the file of the parts from `first` to `last`, both included."""
        return self.start + first * self.size, min(self.start + (last + 1) * self.size, self.stop)

    def is_proven(self, part: int, content: bytes) -> bool:
        digest = self.digests[part * DIGEST_BYTES : (part + 1) * DIGEST_BYTES]
        return xxhash.xxh3_128_digest(content) == digest


def fetch_parts(remote: RemoteFile, path: Path, table: PartTable, parts: Iterable[int], transfer: Transfer) -> None:
    """Make sure that the local file `path` of `remote.bytes` bytes contains these parts, each verified by its hash.

    Other bytes do not change, and correct parts are not written again. No fsync: parts are verified again when they are
    needed again.

    Raises:
        ObjectMissing: there is no such object.
        WrongContentError: its size differs, or a part is still wrong after all attempts.
        DataError: the store cannot be reached.
        OSError: the file cannot be written.
    """
    with open(path, "r+b", buffering=0) as file:
        lacking = [part for part in parts if not _has(file.fileno(), table, part)]
        if not lacking:
            return
        stat_sized(remote, transfer)

        # Adjacent parts are one request. Only this thread writes, because others may end after the file is closed.
        for attempt in range(_ATTEMPTS):
            transfer.stats.add(refetches=attempt > 0)
            bounds = list(_runs(table, lacking))
            with DaemonPool(min(THREADS, len(bounds)), "part") as pool, transfer.stopped_by_errors():
                for some in range(0, len(bounds), _AT_ONCE):
                    ranges = bounds[some : some + _AT_ONCE]
                    bodies = pool.map(lambda bound: read_range(remote.url, *bound, transfer), ranges)
                    for (start, _), body in zip(ranges, bodies, strict=True):
                        _write(file.fileno(), body, start)
            lacking = [part for part in lacking if not _has(file.fileno(), table, part)]
            if not lacking:
                return
    start, stop = table.bounds(lacking[0], lacking[0])
    raise WrongContentError(remote.url, f"has an xxh3_128 of bytes {start}..{stop - 1} that differs from its table")


def _has(descriptor: int, table: PartTable, part: int) -> bool:
    start, stop = table.bounds(part, part)
    return table.is_proven(part, os.pread(descriptor, stop - start, start))


def _runs(table: PartTable, parts: list[int]) -> Iterator[tuple[int, int]]:
    """The byte ranges of consecutive parts, each of at most RANGE_BYTES."""
    most = max(1, RANGE_BYTES // table.size)
    first = last = parts[0]
    for part in parts[1:]:
        if part != last + 1 or part - first >= most:
            yield table.bounds(first, last)
            first = part
        last = part
    yield table.bounds(first, last)


def _write(descriptor: int, body: bytes, start: int) -> None:
    rest = memoryview(body)
    while rest:
        written = os.pwrite(descriptor, rest, start)
        rest = rest[written:]
        start += written
