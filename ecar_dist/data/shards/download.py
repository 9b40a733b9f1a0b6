"""Fetch one shard in parallel ranges to a file that appears whole and proven, or not at all."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ecar_dist.data.shards.manifest import ShardEntry
from ecar_dist.data.shards.proof import ShardDamaged, describe_damage, hash_file
from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.node_lock import owned_temporary
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import ObjectVersion, read_range, stat
from ecar_dist.storage.retries import Transfer

RANGE_BYTES = 8 << 20


@dataclass(frozen=True)
class Download:
    """One shard on its way from `url` to `path`."""

    url: str
    path: Path
    entry: ShardEntry
    transfer: Transfer
    ranges: DaemonPool  # its threads carry the ranges of several downloads

    def __str__(self) -> str:
        return f"shard {redact(self.url)}"


def fetch_shard(download: Download, attempts: int) -> None:
    """Raises ShardDamaged when `attempts` downloads in a row had a wrong hash, DataError for failures of the store.

    OSError where the file cannot be written.
    """
    while (damage := _fetch_once(download)) is not None:
        attempts -= 1
        if attempts == 0:
            raise ShardDamaged(f"{download} {damage}, also when fetched again; upload the shard again")
        download.transfer.stats.add(refetches=1)


def _fetch_once(download: Download) -> str | None:
    """Download, prove and give the file its name; or say what is wrong with its content."""
    entry, before = download.entry, stat(download.url, download.transfer)
    if before.size not in (entry.bytes, None):
        raise ShardDamaged(f"{download} has {before.size} bytes, the manifest says {entry.bytes}; upload it again")
    with owned_temporary(download.path) as (temporary, file):
        os.posix_fallocate(file.fileno(), 0, entry.bytes)  # a full disk shows before the download, not after half of it
        _fetch_ranges(download, file)
        _check_unchanged(download, before)
        found = hash_file(file)
        if found == entry.xxh3_128:
            os.replace(temporary, download.path)  # no fsync: after a power cut the hash tells
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return f"has xxh3_128 {found}, the manifest says {entry.xxh3_128}, {describe_damage(mapped)}"


def _check_unchanged(download: Download, before: ObjectVersion) -> None:
    """Ranges of two versions do not make one shard."""
    after = stat(download.url, download.transfer)
    if after != before:
        raise DataError(
            f"{download} was changed while it was read: version {before.tag} of {before.size} bytes became "
            f"{after.tag} of {after.size}; end what writes there, restore the shard, and start again"
        )


def _fetch_ranges(download: Download, file: BinaryIO) -> None:
    """All bytes of the shard into `file`. Raises the error of the first range that failed."""

    def fetch(start: int, stop: int) -> None:
        body = memoryview(read_range(download.url, start, stop, download.transfer))
        while body:
            written = os.pwrite(file.fileno(), body, stop - len(body))
            body = body[written:]

    end = download.entry.bytes
    starts = range(0, end, RANGE_BYTES)
    futures = [download.ranges.submit(fetch, start, min(start + RANGE_BYTES, end)) for start in starts]
    try:
        for future in futures:
            future.result()
    finally:
        # a range that still ran would write to whatever file had this descriptor next
        for future in [future for future in futures if not future.cancel()]:
            future.exception()
