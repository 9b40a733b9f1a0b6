"""Prove that a shard file matches its manifest entry before any of its bytes are used.

The size and the xxh3_128 hash of the complete file decide. If the hash is wrong, `first_damage` looks for the damaged
part, for the error message: tar headers have checksums, and the `.ecar.json` of a latent shard contains a CRC-32 for
each sample.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from ecar_dist.data.shards.entries import ShardEntry
from ecar_dist.data.shards.layout import DESCRIPTION_NAME, Description, MemberRecord, description_text
from ecar_dist.data.shards.tar_index import BLOCK, padded
from ecar_dist.errors import DataError
from ecar_dist.storage.hashing import hash_open_file
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import file_in, is_remote, local_path
from ecar_dist.storage.untrusted import parse_record

_CHUNK = 1 << 20  # bytes; small enough to stay in the core's cache between the read and the hash


class ShardDamaged(DataError):
    """The file exists, but its content is not what the manifest entry says."""


class ProvenMap(mmap.mmap):
    """A read-only memory map of a shard, and the state of its file when the check of its content began."""

    path: str
    stamp: tuple[int, ...]

    def has_changed(self) -> bool:
        """Whether the file was written to, or another file has its name now. False if the name was removed.

        Raises DataError if the file's attributes cannot be read.
        """
        try:
            return _stamp(os.stat(self.path)) != self.stamp
        except FileNotFoundError:  # a cache evicts files that are still mapped
            return False
        except OSError as error:
            raise _unreadable(Path(self.path), error) from None


def describe_shard(path: Path, count: int, first_index: int) -> ShardEntry:
    """The manifest entry of a finished shard. Reads the file once for its size and hashes."""
    fast = xxhash.xxh3_128()
    strong = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            fast.update(chunk)
            strong.update(chunk)
            size += len(chunk)
    return ShardEntry(path.name, size, count, first_index, fast.hexdigest(), strong.hexdigest())


def local_folder(folder: str | Path) -> Path:
    """The folder as a local path. Raises DataError for a URL."""
    if is_remote(folder):
        raise DataError(
            f"shards must be on a local or mounted file system, got {redact(folder)}; copy them and give the folder"
        )
    return local_path(folder)


def check_size(path: Path, entry: ShardEntry) -> None:
    """Check existence and size only. Raises ShardDamaged for a wrong size, DataError if the file cannot be read."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size != entry.bytes:
        raise _wrong_size(path, size, entry)


def check_presence(folder: str | Path, entries: Iterable[ShardEntry]) -> None:
    """Check that these shards of a local set exist and have their sizes. Raises DataError that names the first bad one.

    Shards behind a URL are not checked here, because that costs one request each. They are checked when downloaded.
    """
    if not is_remote(folder):
        for entry in entries:
            check_size(file_in(folder, entry.name), entry)


def map_verified(path: Path, entry: ShardEntry) -> ProvenMap:
    """Hash every byte of a shard, then map it.

    Raises ShardDamaged if the size or the hash differs from the entry, DataError if the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return map_open_file(file, path, entry)
    except OSError as error:
        raise _unreadable(path, error) from None


def map_open_file(file: BinaryIO, path: Path, entry: ShardEntry) -> ProvenMap:
    """Like `map_verified`, for a file opened without a buffer. Raises OSError if it cannot be read."""
    before = os.fstat(file.fileno())
    if before.st_size != entry.bytes:
        raise _wrong_size(path, before.st_size, entry)

    # The stamp is taken before the hash: a write during the check shows up as a change later.
    found = hash_open_file(file)
    mapped = ProvenMap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.path = str(path)
    mapped.stamp = _stamp(before)
    if found != entry.xxh3_128:
        raise ShardDamaged(
            f"shard {path} has xxh3_128 {found}, the manifest says {entry.xxh3_128}, "
            f"{describe_damage(mapped)}; {_fix(path)}"
        )
    return mapped


def describe_damage(mapped: mmap.mmap) -> str:
    """Part of an error message: where the damage is, or that its offset is unknown."""
    offset = first_damage(mapped)
    return "at an unknown offset" if offset is None else f"the first damage is at or after byte {offset}"


def describe_damage_in(file: BinaryIO) -> str:
    """Like `describe_damage`, for an open file."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return describe_damage(mapped)


def first_damage(mapped: mmap.mmap) -> int | None:
    """Offset of the first tar header, sample or description that is known to be wrong; None if nothing is.

    A damaged header is located to its block, a damaged payload to its sample.
    """
    headers = _first_bad_header(mapped)

    # The description is the last member, so its name is searched for from the end.
    found = mapped.rfind(DESCRIPTION_NAME.encode() + b"\0")
    samples = None
    if found >= 0 and found % BLOCK == 0:
        try:
            description = parse_record(description_text(mapped[found:]), Description)
            samples = _first_bad_sample(mapped, description)
        except ValueError:
            samples = found
    return min((offset for offset in (headers, samples) if offset is not None), default=None)


def _first_bad_header(mapped: mmap.mmap) -> int | None:
    """Walk the archive from header to header. Returns the first offset without a valid one."""
    at = 0
    while at + BLOCK <= len(mapped):
        # A zeroed block ends the archive, and only zeros may follow it.
        block = mapped[at : at + BLOCK]
        if not any(block):
            return at if any(mapped[at:]) else None

        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            return at
        if size < 0 or at + BLOCK + size > len(mapped):
            return at
        at += BLOCK + padded(size)
    return None


def _first_bad_sample(mapped: mmap.mmap, description: Description) -> int | None:
    """The first sample whose payloads do not have the CRC-32 that its writer stated."""
    layout = description.layout
    sums = np.frombuffer(base64.b64decode(description.crc32), dtype="<u4").tolist()
    for row, expected in enumerate(sums):
        start = layout.first_offset + row * layout.stride
        if zlib.crc32(b"".join(_payloads(mapped, start, layout.members))) != expected:
            return start
    return None


def _payloads(mapped: mmap.mmap, start: int, members: Sequence[MemberRecord]) -> Iterator[bytes]:
    """The payload of each member of the sample at byte `start`."""
    for member in members:
        at = start + member.rel_offset
        size = member.nbytes
        if size is None:  # the size of a label varies, so it is read from the label's tar header
            header = at - BLOCK
            size = int(mapped[header + 124 : header + 135].rstrip(b"\0 ") or b"0", 8)
        yield mapped[at : at + size]


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _wrong_size(path: Path, size: int, entry: ShardEntry) -> ShardDamaged:
    return ShardDamaged(f"shard {path} has {size} bytes, the manifest says {entry.bytes}; {_fix(path)}")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read shard {path} ({error.strerror}), but the manifest lists it; {_fix(path)}")


def _fix(path: Path) -> str:
    return f"restore the file, or delete {path.with_suffix('').name}.* there and run the command that made it again"
