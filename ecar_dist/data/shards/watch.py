"""Detect mapped shards that change after they were proven, before the rows that were copied from them are used.

A memory map shows the current content of its file, not the content that was proven. There are two checks, because each
misses some changes:

    the file     size, mtime, ctime and inode of all shards of a batch, after its rows were copied. Finds every change
                 by write(2) or by a rename, even if mtime was set back: only the kernel sets ctime. Misses writes
                 through a shared map on file systems that do not update ctime for them (tmpfs), and writes from another
                 node until the attributes are refreshed (NFS).
    the content  one value of every row, compared with its value at the proof. The column of the value is random and
                 known to this process only. Finds every overwritten row, unless this value stays the same.

A batch may need hundreds of shards, and each file check takes about 2 microseconds. So checks are limited to a share of
the reader's time: after a check that took t, batches are not checked for 150 t, at most 0.1 s. A training step takes
longer than that, so each of its batches is checked. A faster consumer sees a change at the next check.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

PAUSE = 150  # times the duration of a check: checks take 1/150 of the reader's time
LONGEST_PAUSE = 0.1  # seconds
_PROBE = np.dtype(np.uint16)  # the bits of one fp16 value, so that a NaN is equal to itself


class WatchedShard(Protocol):
    """The part of `LatentShard` that is watched."""

    @property
    def moments(self) -> np.ndarray: ...

    @property
    def mirrored(self) -> np.ndarray: ...

    def has_changed(self) -> bool: ...


class ShardWatch:
    """The checks of one data set, given the samples of each shard and the number of values (`width`) of a sample.

    Memory: 8 bytes for each shard of the set. For each sample of the shards that are open at a time, 2 bytes, or 4 with
    mirrored images.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, width: int, has_flip: bool) -> None:
        self._width = width
        self._next_check = -math.inf  # time.perf_counter()

        # One probe for each row and side (plain, mirrored) of each shard that is known now. Every such shard has a slot
        # as large as that of the largest shard.
        self._sides = 1 + has_flip
        self._slot_size = int(np.max(counts)) * self._sides
        self._slots = np.zeros(len(counts), dtype=np.int64)  # of each shard that is known
        self._free: list[int] = []
        self._probes = np.empty(0, _PROBE)  # [slots, rows, sides]

        # The column to compare in each row of a shard. It is unpredictable, so no writer can avoid it.
        generator = np.random.default_rng(int.from_bytes(os.urandom(16)))
        self._columns = generator.integers(0, width, int(np.max(counts)), dtype=np.int64)  # [largest shard]
        self._known: set[int] = set()

    def learn(self, owner: int, shard: WatchedShard) -> None:
        """Remember the probes of a shard that was just proven. The next batch will be checked."""
        if owner not in self._known:
            self._slots[owner] = self._free.pop() if self._free else self._new_slot()
            self._known.add(owner)
        rows = np.arange(len(shard.moments))
        at = self._slots[owner] * self._slot_size + rows * self._sides
        for side, view in enumerate((shard.moments, shard.mirrored)[: self._sides]):
            values = view.reshape(len(rows), -1).view(_PROBE)  # [count, width]
            self._probes[at + side] = values[rows, self._columns[rows]]
        self._next_check = -math.inf

    def forget(self, owner: int) -> None:
        """Forget a shard that is not open any more: its memory may be reused for the probes of another one."""
        if owner in self._known:
            self._known.remove(owner)
            self._free.append(int(self._slots[owner]))

    def _new_slot(self) -> int:
        """The number of an unused slot. The table doubles when it is full."""
        used = len(self._known)
        if (used + 1) * self._slot_size > len(self._probes):
            grown = np.empty(2 * (used + 1) * self._slot_size, _PROBE)
            grown[: len(self._probes)] = self._probes
            self._probes = grown
        return used

    def is_due(self) -> bool:
        """Whether the next batch must be checked."""
        return time.perf_counter() >= self._next_check

    def checked(self, seconds: float) -> None:
        """Report how long the checks of a batch took."""
        self._next_check = time.perf_counter() + min(LONGEST_PAUSE, PAUSE * seconds)

    def changed_rows(
        self, owners: np.ndarray, rows: np.ndarray, flip: np.ndarray | None, copied: np.ndarray
    ) -> set[int]:
        """Shards with a row that is not as proven. `copied`: fp16 [n, ...], mirrored where `flip` is set."""
        # Index of the probe of each row in the flat copy, and in the table of probes. [n]
        positions = np.arange(len(rows)) * self._width + self._columns[rows]
        at = self._slots[owners] * self._slot_size + rows * self._sides
        if self._sides == 2 and flip is not None:
            at += flip
        different = copied.reshape(-1).view(_PROBE)[positions] != self._probes[at]
        return set(owners[different].tolist())


def changed_files(owners: Iterable[int], shards: Mapping[int, WatchedShard]) -> set[int]:
    """The shards whose file has changed since their proof began."""
    return {owner for owner in owners if shards[owner].has_changed()}
