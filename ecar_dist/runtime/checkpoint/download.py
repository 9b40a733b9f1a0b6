"""One file of a checkpoint from a bucket to a disk of the node: there whole and proven, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import DamagedError, hash_file, readable
from ecar_dist.runtime.checkpoint.manifest import RankFile
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.node_lock import owned_temporary
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import read_range, stat
from ecar_dist.storage.retries import ObjectMissing, Transfer

FULL = (errno.ENOSPC, errno.EDQUOT)
_RANGE = 16 << 20  # bytes of one request
_THREADS = 8  # ranges of one file at a time


def download_file(url: str, wanted: RankFile, path: Path, transfer: Callable[[int], Transfer]) -> None:
    """Have the file `wanted` of a manifest at `path`; `transfer` is for so many bytes.

    Raises DamagedError where the store has none or another, DataError where it is out of reach, CheckpointError where
    there is no room.
    """
    size = wanted.bytes
    if path.exists() and path.stat().st_size == size and hash_file(path) == wanted.xxh3_128:
        return
    try:
        found = stat(url, transfer(0)).size
    except ObjectMissing:
        raise DamagedError(redact(url), f"{wanted.name} is missing") from None
    if found not in (size, None):
        raise DamagedError(redact(url), f"{wanted.name} has {found} bytes, expected {size}")
    with owned_temporary(path) as (temporary, file):
        _reserve(file, size, path)
        for _ in range(2):  # what was corrupted on the way arrives whole the second time
            _fetch_ranges(url, size, file, transfer(size))
            if hash_file(temporary) == wanted.xxh3_128:
                os.replace(temporary, path)  # no fsync: it is proven again before each use
                return
    raise DamagedError(redact(url), f"{wanted.name} does not have its recorded hash")


def _reserve(file: BinaryIO, size: int, path: Path) -> None:
    """A full disk shows before the download, not after half of it."""
    try:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        if error.errno not in FULL:
            raise
        found = os.statvfs(path.parent)
        free = readable(found.f_bavail * found.f_frsize)
        raise CheckpointError(
            f"{path.parent} is full: a file of a checkpoint needs {readable(size)} and {free} are free; set "
            f"data.cache.dir to a larger disk of the node"
        ) from None


def _fetch_ranges(url: str, size: int, file: BinaryIO, transfer: Transfer) -> None:
    def fetch(start: int) -> None:
        body = memoryview(read_range(url, start, stop := min(start + _RANGE, size), transfer))
        while body:
            body = body[os.pwrite(file.fileno(), body, stop - len(body)) :]

    with DaemonPool(_THREADS, "checkpoint-range") as pool, transfer.stopped_by_errors():
        for _ in pool.map(fetch, range(0, size, _RANGE)):
            pass
