"""What all shards share: a file proven equal to its manifest entry before a byte of it is used."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

import xxhash

from ecar_dist.data.manifest import ShardEntry
from ecar_dist.errors import DataError

_CHUNK = 1 << 22


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
    """Raises DataError for a URL: shards are mapped, so they must lie on a file system."""
    text = str(folder).removeprefix("file://")
    if "://" in text:
        raise DataError(
            f"shards must be on a local or mounted file system, got {folder}; copy them and give the folder"
        )
    return Path(text)


def check_size(path: Path, entry: ShardEntry) -> None:
    """The cheap check. Raises DataError where the shard is missing or was cut."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read shard {path} ({error.strerror}), the manifest lists it; {_mend(path)}") from None
    if size != entry.bytes:
        raise DataError(f"shard {path} has {size} bytes, the manifest says {entry.bytes}; {_mend(path)}")


def check_presence(folder: str | Path, entries: Sequence[ShardEntry]) -> None:
    """Every shard of a set is there and has its size. Raises DataError naming the first that is not."""
    for entry in entries:
        check_size(local_folder(folder) / entry.name, entry)


def map_verified(path: Path, entry: ShardEntry) -> mmap.mmap:
    """Map a shard whose every byte was just hashed. Hashing also brings it into memory sequentially."""
    check_size(path, entry)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = xxhash.xxh3_128_hexdigest(mapped)
    if found != entry.xxh3_128:
        raise DataError(f"shard {path} has xxh3_128 {found}, the manifest says {entry.xxh3_128}; {_mend(path)}")
    return mapped


def _mend(path: Path) -> str:
    return f"restore the file, or delete {path.with_suffix('').name}.* there and run the command that made it again"
