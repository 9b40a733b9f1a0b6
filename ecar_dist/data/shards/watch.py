"""Mapped shards that change after their proof: found before what was copied out of them is used.

A map shows what is in the file now, not what was proven. Two looks are taken, since neither is enough by itself:

    the file     size, mtime, ctime and inode of all shards of a batch, after its rows were copied. Finds every change
                 made by write(2) or by renaming, whatever mtime it leaves behind: ctime is the kernel's. Not found so
                 are writes through a shared map where the file system does not note them (tmpfs), or of another node
                 before the attributes are fetched again (NFS).
    the content  of every row one value, at a place keyed by this process, against the value that was there at the
                 proof. Finds a row that was written over by whatever means; not a change that leaves this one value as
                 it was.

A batch may touch hundreds of shards, at about 2 microseconds each. So looks take a bounded share of the reader's time:
after one that took t, the batches of the next 150 t (0.1 s at most) are handed out without. Training takes longer over
a batch, and has each one looked at; a consumer in a hurry learns of a change at the next look.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

PAUSE = 150  # times the time of a look: 1/150 of the reader's time goes into looks
LONGEST_PAUSE = 0.1  # seconds
_PROBE = np.dtype(np.uint16)  # one fp16 value as its bits: a NaN equals itself


class WatchedShard(Protocol):
    """What `LatentShard` has."""

    @property
    def moments(self) -> np.ndarray: ...

    @property
    def mirrored(self) -> np.ndarray: ...

    def has_changed(self) -> bool: ...


class ShardWatch:
    """Of one set: samples of each shard, and values of each sample. Holds 2 bytes a sample, 4 with mirrored ones."""

    def __init__(self, counts: Sequence[int], width: int, has_flip: bool) -> None:
        self._sides = 1 + has_flip
        ends = np.cumsum(counts, dtype=np.int64)
        self._firsts = (ends - counts) * self._sides
        self._probes = np.empty(int(ends[-1]) * self._sides, _PROBE)  # [samples, sides]
        # which value of a row is compared: nobody else's to know, so that no writer could spare it
        keyed = np.random.default_rng(int.from_bytes(os.urandom(16)))
        self._columns = keyed.integers(0, width, max(counts), dtype=np.int64)
        self._width, self._next_look = width, -math.inf

    def learn(self, owner: int, shard: WatchedShard) -> None:
        """Note the values of a shard whose content was just proven. The next batch is looked at."""
        rows = np.arange(len(shard.moments))
        at = self._firsts[owner] + rows * self._sides
        for side, view in enumerate((shard.moments, shard.mirrored)[: self._sides]):
            self._probes[at + side] = view.reshape(len(rows), -1).view(_PROBE)[rows, self._columns[rows]]
        self._next_look = -math.inf

    def is_due(self) -> bool:
        """Whether the next batch is to be looked at."""
        return time.perf_counter() >= self._next_look

    def looked(self, seconds: float) -> None:
        """Tell how long the looks at a batch took."""
        self._next_look = time.perf_counter() + min(LONGEST_PAUSE, PAUSE * seconds)

    def changed_rows(
        self, owners: np.ndarray, rows: np.ndarray, flip: np.ndarray | None, copied: np.ndarray
    ) -> set[int]:
        """Shards of rows that are not what was proven. `copied`: fp16 [n, ...], where `flip` mirrored ones."""
        places = np.arange(len(rows)) * self._width + self._columns[rows]
        at = self._firsts[owners] + rows * self._sides
        if self._sides == 2 and flip is not None:
            at += flip
        strange = copied.reshape(-1).view(_PROBE)[places] != self._probes[at]
        return set(owners[strange].tolist())


def changed_files(owners: Iterable[int], shards: Mapping[int, WatchedShard]) -> set[int]:
    """Those of the shards whose file is not as it was when its proof began."""
    return {owner for owner in owners if shards[owner].has_changed()}
