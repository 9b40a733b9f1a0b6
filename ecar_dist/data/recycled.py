"""Arrays whose memory is used again once nobody holds them.

A batch of some megabytes that is fresh from the system costs a page fault for every page; measured, that took as long
as the copy into it.
"""

from __future__ import annotations

import weakref

import numpy as np

_KEPT = 16  # free blocks: what a loader's queue gives back at once


class RecycledArrays:
    """Arrays of one dtype. Safe to drop from any thread: a block comes back when its last view is gone."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """As np.empty."""
        size = int(np.prod(shape))
        block = self._free.pop() if self._free else np.empty(size, self._dtype)
        if block.size < size:
            block = np.empty(size, self._dtype)
        # every later view has `lent` as its base; of an array it would have the block, and `lent` would die before it
        lent = np.frombuffer(block.data, self._dtype, size)
        weakref.finalize(lent, self._take_back, block).atexit = False
        return lent.reshape(shape)

    def _take_back(self, block: np.ndarray) -> None:
        if len(self._free) < _KEPT:
            self._free.append(block)
