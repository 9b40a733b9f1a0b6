"""Rate of a first pass over shards that are not in the page cache, compared with the disk's sequential rate."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_CHUNK = 4 << 20


def cold_share(files: Sequence[Path], first_pass: Callable[[], float], repeats: int) -> dict[str, float] | None:
    """Alternate `first_pass`, which reads all files in another process and returns its seconds, with plain reading.

    None if the page cache cannot be dropped: a file system in memory, or files that another process has mapped.
    """
    total = sum(path.stat().st_size for path in files)
    shares = []
    rates = []
    for _ in range(repeats):
        if not drop_pages(files):
            return None
        disk = read_sequentially(files)
        if not drop_pages(files):
            return None
        shares.append(disk / first_pass())
        rates.append(total / disk / 1e6)
    return {"share_of_disk": statistics.median(shares), "disk_mb_per_second": statistics.median(rates)}


def drop_pages(files: Sequence[Path]) -> bool:
    """Write back the files and drop their pages. Returns whether the pages are gone."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(_in_memory(path) for path in files)


def _in_memory(path: Path) -> bool:
    """Whether the middle of the file can be read without disk access."""
    with open(path, "rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:  # the file system does not support RWF_NOWAIT, so it is on a disk
            return False


def read_sequentially(files: Sequence[Path]) -> float:
    """Seconds to read all files, one after the other, into one buffer."""
    buffer = bytearray(_CHUNK)
    began = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began
