"""How near a first pass over shards that no one has read comes to the disk's own sequential rate."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_CHUNK = 4 << 20


def cold_share(files: Sequence[Path], first_pass: Callable[[], float], repeats: int) -> dict[str, float] | None:
    """`first_pass` reads all `files` in a process of its own and returns its seconds; alternated with plain reading.

    None where pages cannot be dropped: a file system in memory, or files that someone else has mapped.
    """
    total = sum(path.stat().st_size for path in files)
    shares, rates = [], []
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
    """Write back and drop the files' pages; whether they are gone."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(_in_memory(path) for path in files)


def _in_memory(path: Path) -> bool:
    """Whether the middle of the file can be read without going to the disk."""
    with open(path, "rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:  # a file system that cannot tell: it is a disk's
            return False


def read_sequentially(files: Sequence[Path]) -> float:
    """Seconds for all bytes, one file after the other, into one buffer."""
    buffer = bytearray(_CHUNK)
    began = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began
