"""What all shards share: a file proven equal to its manifest entry before a byte of it is used."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import xxhash

from ecar_dist.data.shards.damage import describe_damage
from ecar_dist.data.shards.manifest import ShardEntry
from ecar_dist.errors import DataError
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import file_in, is_remote, local_path

_CHUNK = 1 << 20  # small enough to stay in the core's cache between the read and the hash


class ShardDamaged(DataError):
    """The file is there, and is not what its manifest entry says."""


class ProvenMap(mmap.mmap):
    """A shard mapped read-only, and how its file stood when the proof of its content began."""

    path: str
    stamp: tuple[int, ...]

    def has_changed(self) -> bool:
        """Whether another file has the name now, or this one was written to. One without a name is out of reach."""
        try:
            return _stamp(os.stat(self.path)) != self.stamp
        except FileNotFoundError:  # a cache evicts files that are still mapped
            return False
        except OSError as error:
            raise _unreadable(Path(self.path), error) from None


def describe_shard(path: Path, count: int, first_index: int) -> ShardEntry:
    """Read a finished shard once and state its size and hashes."""
    fast, strong, size = xxhash.xxh3_128(), hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            fast.update(chunk)
            strong.update(chunk)
            size += len(chunk)
    return ShardEntry(path.name, size, count, first_index, fast.hexdigest(), strong.hexdigest())


def local_folder(folder: str | Path) -> Path:
    """Raises DataError for a URL, where the caller can only work on files."""
    if is_remote(folder):
        raise DataError(
            f"shards must be on a local or mounted file system, got {redact(folder)}; copy them and give the folder"
        )
    return local_path(folder)


def check_size(path: Path, entry: ShardEntry) -> None:
    """The cheap check. Raises DataError where the shard is missing or was cut."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size != entry.bytes:
        raise ShardDamaged(f"shard {path} has {size} bytes, the manifest says {entry.bytes}; {_fix(path)}")


def check_presence(folder: str | Path, entries: Sequence[ShardEntry]) -> None:
    """Every shard of a local set is there and has its size. Raises DataError naming the first that is not.

    Shards behind a URL are not asked for, one request each: their size is checked when they are fetched.
    """
    if not is_remote(folder):
        for entry in entries:
            check_size(file_in(folder, entry.name), entry)


def map_verified(path: Path, entry: ShardEntry) -> ProvenMap:
    """Map a shard whose every byte was just hashed.

    Raises ShardDamaged where size or hash differ, DataError where the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return map_open_file(file, path, entry)
    except OSError as error:
        raise _unreadable(path, error) from None


def map_open_file(file: BinaryIO, path: Path, entry: ShardEntry) -> ProvenMap:
    """As `map_verified`, of an open file. Raises OSError where it cannot be read."""
    before = os.fstat(file.fileno())
    if before.st_size != entry.bytes:
        raise ShardDamaged(f"shard {path} has {before.st_size} bytes, the manifest says {entry.bytes}; {_fix(path)}")
    found = hash_file(file)
    mapped = ProvenMap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.path, mapped.stamp = str(path), _stamp(before)
    if found != entry.xxh3_128:
        raise ShardDamaged(
            f"shard {path} has xxh3_128 {found}, the manifest says {entry.xxh3_128}, "
            f"{describe_damage(mapped)}; {_fix(path)}"
        )
    return mapped


def hash_file(file: BinaryIO) -> str:
    """xxh3_128 of a file open without a buffer, from its start.

    Read and not mapped: page faults alone bring a cold file in at a third to all of the disk's rate, from one run to
    the next; reads always bring it in at that rate, and what they read is in memory when it is mapped.
    """
    digest, chunk = xxhash.xxh3_128(), bytearray(_CHUNK)
    view = memoryview(chunk)
    file.seek(0)
    while got := file.readinto(chunk):  # type: ignore[attr-defined]
        digest.update(view[:got])
    return digest.hexdigest()


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read shard {path} ({error.strerror}), the manifest lists it; {_fix(path)}")


def _fix(path: Path) -> str:
    return f"restore the file, or delete {path.with_suffix('').name}.* there and run the command that made it again"
