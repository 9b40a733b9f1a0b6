"""Download an object in parallel ranges to a file that appears only when it is complete and verified.

Each range is retried separately, as in `retries.py`: a range that fails is requested again, and the others are kept.
"""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.hashing import hash_open_file
from ecar_dist.storage.node_lock import owned_temporary
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import ObjectVersion, read_range, stat
from ecar_dist.storage.retries import Transfer

RANGE_BYTES = 8 << 20
THREADS = 8  # of a download without a shared pool


@dataclass(frozen=True)
class RemoteFile:
    """An object, and the content that a manifest promises."""

    url: str
    bytes: int
    xxh3_128: str


class WrongContentError(DataError):
    """The object does not have the promised content. `problem` is a phrase that follows the object's name."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{redact(url)} {problem}; upload it again")
        self.problem = problem


def cache_folder(chosen: str | Path | None) -> Path:
    """The folder for a node's downloads: `chosen`, else $ECAR_CACHE_DIR, else one per user in the temporary folder.

    Raises DataError if the default folder belongs to another user, who could change files after they were verified.
    """
    if chosen := chosen or os.environ.get("ECAR_CACHE_DIR"):
        return Path(chosen)
    default = Path(tempfile.gettempdir(), f"ecar-cache-{os.getuid()}")
    if default.is_symlink() or (default.exists() and default.stat().st_uid != os.getuid()):
        raise DataError(
            f"the cache folder {default} is a link or belongs to another user; set data.cache.dir or ECAR_CACHE_DIR"
        )
    return default


def fetch_file(
    remote: RemoteFile,
    path: Path,
    transfer: Transfer,
    *,
    pool: DaemonPool | None = None,
    attempts: int = 2,
    describe_damage: Callable[[BinaryIO], str] = lambda file: "",
) -> None:
    """Download `remote` to `path`. The file appears there only with its promised size and hash.

    Args:
        pool: threads that several downloads share. Without a pool, the download has its own threads and its own
            `transfer`: an error or Ctrl-C ends all requests of this transfer.
        attempts: number of downloads before a wrong hash is an error.
        describe_damage: returns a phrase about the damage in a file with a wrong hash.

    Raises:
        ObjectMissing: there is no such object.
        WrongContentError: its size differs, or its hash still differs after all attempts.
        DataError: the store cannot be reached, or the object changed during the download.
        OSError: the file cannot be written.
    """
    before = stat_sized(remote, transfer)
    with owned_temporary(path) as (temporary, file):
        # A full disk is an error now, not halfway through the download.
        if remote.bytes:
            os.posix_fallocate(file.fileno(), 0, remote.bytes)

        for attempt in range(attempts):
            transfer.stats.add(refetches=attempt > 0)
            _fetch_ranges(remote, file, transfer, pool)
            found = hash_open_file(file)
            if found == remote.xxh3_128:
                # No fsync: after a power failure the hash shows whether the file is complete.
                os.replace(temporary, path)
                return
            _check_unchanged(remote, before, stat(remote.url, transfer))
        damage = describe_damage(file)

    problem = f"has xxh3_128 {found}, the manifest says {remote.xxh3_128}"
    raise WrongContentError(remote.url, f"{problem}, {damage}" if damage else problem)


def stat_sized(remote: RemoteFile, transfer: Transfer) -> ObjectVersion:
    """Size and version of the object. Raises WrongContentError if the size is wrong: it is not downloaded at all.

    A range beyond its end would be retried for minutes.
    """
    found = stat(remote.url, transfer)
    if found.size not in (remote.bytes, None):
        raise WrongContentError(remote.url, f"has {found.size} bytes, the manifest says {remote.bytes}")
    return found


def _check_unchanged(remote: RemoteFile, before: ObjectVersion, after: ObjectVersion) -> None:
    """Raises DataError if the object was replaced: the ranges are of two versions, so the hash is wrong.

    The writer is at fault then, not the content.
    """
    if after != before:
        raise DataError(
            f"{redact(remote.url)} changed during its download: version {before.tag} of {before.size} bytes became "
            f"{after.tag} of {after.size}; stop the program that writes there, restore the object, and start again"
        )


def _fetch_ranges(remote: RemoteFile, file: BinaryIO, transfer: Transfer, shared: DaemonPool | None) -> None:
    """Write all bytes of the object into `file`. Raises the first error of a range."""

    def fetch(start: int) -> None:
        stop = min(start + RANGE_BYTES, remote.bytes)
        body = memoryview(read_range(remote.url, start, stop, transfer))
        while body:
            written = os.pwrite(file.fileno(), body, stop - len(body))
            body = body[written:]

    pool = shared or DaemonPool(THREADS, "range")
    futures: list[Future[None]] = []
    finished: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
    try:
        for start in range(0, remote.bytes, RANGE_BYTES):
            futures.append(pool.submit(fetch, start))
            futures[-1].add_done_callback(finished.put)
        # In order of completion, so that an error is seen before another range has finished its retries.
        for _ in futures:
            finished.get().result()
    except BaseException:
        if shared is None:
            transfer.stopping.set()  # other requests in progress would retry for minutes
        raise
    finally:
        # Wait for the ranges in progress: their file descriptor may be reused after this function.
        for future in futures:
            if not future.cancel():
                future.exception()
        if shared is None:
            pool.end()
