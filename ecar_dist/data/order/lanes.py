"""The order of samples: a pure function of (seed, position), the same for every number of ranks.

Position t = 0, 1, 2, ... runs over the whole run and its epoch is t // count: every sample comes once in each epoch's
positions, and a batch may straddle two epochs. Nothing is padded or dropped, and the state is one number: t.

`LaneOrder` keeps a rank to few shards at a time. In each epoch the shards are permuted and laid end to end; the line is
cut into `lanes` ranges, position t belongs to lane t % lanes, and a lane goes through its range window by window, each
window in a keyed order of its own. Rank r of R takes every R-th position, so where R divides the lanes it reads
its lanes' shards and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute
from ecar_dist.errors import ConfigError, DataError

_SHARDS, _WINDOW = (int.from_bytes(purpose, "big") for purpose in (b"shards", b"window"))  # what a key is for
_LANES = (1, 2, 4, 8, 16, 32, 64, 192, 960)  # multiples of each other up to 64, then with room for ranks in threes
_SHARDS_PER_LANE = 4
_CACHED_TABLES = 4  # a batch straddles two epochs, and the prefetch may be in the next


def sample_indices(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sample index in [0, count) for each position under one permutation of the whole set per epoch, int64 in and out.

    The permutation with which sets are written. Positions may straddle epochs.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    positions = np.asarray(positions, dtype=np.int64)
    epochs, places = np.divmod(positions.reshape(-1), count)
    return permute(places, count, hash_keys(seed, epochs), bits_for(count)).reshape(positions.shape)


def rank_positions(step_start: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of one rank inside the global batch that begins at `step_start`: every world_size-th, int64."""
    return np.arange(step_start + rank, step_start + global_batch_size, world_size, dtype=np.int64)


def default_lanes(num_shards: int) -> int:
    """The most lanes that leave each about four shards. All but a few numbers of ranks in use divide one of them."""
    return max(lanes for lanes in _LANES if lanes <= max(1, num_shards // _SHARDS_PER_LANE))


class LaneOrder:
    """counts: samples of each shard, in the manifest's order. window_shards: the most samples of a window, in units of
    the largest shard; 0 makes each lane one window. Memory: 16 bytes per shard and cached epoch.

    Attributes: `count` samples in all, `first_index` int64 [shards] of each shard's first sample, `windows` in a lane.

    Raises DataError for an empty set, ConfigError for lanes or windows that it cannot have.
    """

    name = "lanes-feistel-v1"

    def __init__(self, counts: Sequence[int], seed: int, lanes: int, window_shards: int = 4) -> None:
        self.counts = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.count = int(self.counts.sum())
        if self.count < 1 or self.counts.min() < 0:
            raise DataError(f"shards with {self.counts.tolist()[:8]} samples: an order needs 1 or more; encode the set")
        if not 1 <= lanes <= self.count:
            raise ConfigError(f"lanes={lanes} for {self.count} samples; set 1 <= lanes <= {self.count}")
        if window_shards < 0:
            raise ConfigError(f"window_shards={window_shards}; set 1 or more shards, or 0 for whole lanes")
        self.seed, self.lanes, self.window_shards = seed, lanes, window_shards
        self.first_index = np.cumsum(self.counts) - self.counts  # of each shard
        longest_lane = -(-self.count // lanes)
        self.windows = -(-longest_lane // (window_shards * int(self.counts.max()) or longest_lane))  # in each lane
        self._bits = bits_for(-(-longest_lane // self.windows))
        self._tables = lru_cache(maxsize=_CACHED_TABLES)(self._lay_out)

    def describe(self) -> dict[str, Any]:
        """What the order depends on besides the dataset: JSON values, part of a run's identity."""
        return {"name": self.name, "seed": self.seed, "lanes": self.lanes, "window_shards": self.window_shards}

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """Dense sample index (shard after shard in the manifest's order) for each position, int64 in and out."""
        shards, rows = self.locate(positions)
        return self.first_index[shards] + rows

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and row in that shard, for each position: int64, in the shape of the positions."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions.reshape(-1), self.count)
        turns, lanes = np.divmod(places, self.lanes)
        windows = self._window_of(lanes, turns)
        begins, ends = self._window_edges(lanes, windows)
        keys = hash_keys(self.seed, _WINDOW, epochs, lanes, windows)
        turns = begins + permute(turns - begins, ends - begins, keys, self._bits)
        shards, rows = self._look_up(epochs, self._lane_start(lanes) + turns)
        return shards.reshape(positions.shape), rows.reshape(positions.shape)

    def upcoming(self, start: int, stop: int, ranks: Sequence[int], world_size: int) -> list[int]:
        """Shards of the windows that positions t in [start, stop) with t % world_size in `ranks` touch, each once.

        In the order in which their windows are first touched; within a window, as they lie in the epoch's line. Never
        misses a shard; may name one that its window holds and these positions happen to pass by. The cost grows with
        windows, not with samples.
        """
        residues = np.unique(np.asarray(ranks, dtype=np.int64))
        first_uses: dict[int, None] = {}
        filled = int(np.count_nonzero(self.counts))
        for epoch in range(start // self.count, -(-stop // self.count)):
            epoch_start = epoch * self.count
            begin, end = max(start - epoch_start, 0), min(stop - epoch_start, self.count)
            lanes, windows = self._touched(begin, end, (residues - epoch_start) % world_size, world_size)
            first_uses.update(dict.fromkeys(self._shards_of(epoch, lanes, windows)))
            if len(first_uses) == filled:
                break
        return list(first_uses)

    def _lane_size(self, lanes: np.ndarray) -> np.ndarray:
        return self.count // self.lanes + (lanes < self.count % self.lanes)

    def _lane_start(self, lanes: np.ndarray) -> np.ndarray:
        """Where a lane's range begins in the line of all samples."""
        return lanes * (self.count // self.lanes) + np.minimum(lanes, self.count % self.lanes)

    def _window_edges(self, lanes: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First turn of a window in its lane, and the turn after its last. Sizes differ by at most one in the whole
        order: a short last window would be a badly shuffled one."""
        sizes = self._lane_size(lanes)
        return windows * sizes // self.windows, (windows + 1) * sizes // self.windows

    def _window_of(self, lanes: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The window k whose edges hold the turn: the least k with turn + 1 <= (k + 1) size / windows."""
        return ((turns + 1) * self.windows - 1) // self._lane_size(lanes)

    def _touched(self, begin: int, end: int, residues: np.ndarray, modulus: int) -> tuple[np.ndarray, np.ndarray]:
        """(lane, window) of all windows with a place p in [begin, end), p % modulus in `residues`, by their first p.

        Turn q of lane l is place p = l + q lanes. With g = gcd(lanes, modulus), p = r (mod modulus) has solutions q
        where g divides r - l, and they are modulus / g apart.
        """
        lanes = np.arange(self.lanes)
        low, high = -((lanes - begin) // self.lanes), -((lanes - end) // self.lanes)  # turns [low, high) of each lane
        lanes, low, high = (column[low < high] for column in (lanes, low, high))
        first_window = self._window_of(lanes, low)
        which, step = _ranges(self._window_of(lanes, high - 1) + 1 - first_window)
        lanes, windows = lanes[which], first_window[which] + step
        begins, ends = self._window_edges(lanes, windows)
        low = np.maximum(begins, low[which])
        divisor = math.gcd(self.lanes, modulus)
        period = modulus // divisor
        quotients, remainders = np.divmod((residues[:, None] - lanes) % modulus, divisor)  # [ranks, windows]
        solution = quotients * pow(self.lanes // divisor, -1, period) % period
        turns = low + (solution - low) % period
        touched = (remainders == 0) & (turns < ends)
        first_place = np.where(touched, lanes + turns * self.lanes, end).min(axis=0, initial=end)
        by_place = np.argsort(first_place, kind="stable")[: np.count_nonzero(first_place < end)]
        return lanes[by_place], windows[by_place]

    def _shards_of(self, epoch: int, lanes: np.ndarray, windows: np.ndarray) -> Iterator[int]:
        """All shards of the windows, one window after the other; a shard in two windows comes twice."""
        begins, ends = self._window_edges(lanes, windows)
        line_shards, line_starts = self._tables((epoch,))
        first = np.searchsorted(line_starts, self._lane_start(lanes) + begins, side="right") - 1
        last = np.searchsorted(line_starts, self._lane_start(lanes) + ends - 1, side="right") - 1
        which, step = _ranges(last + 1 - first)
        shards = line_shards[first[which] + step]
        return iter(shards[self.counts[shards] > 0].tolist())

    def _look_up(self, epochs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of places in the lines of their epochs."""
        different, which = np.unique(epochs, return_inverse=True)
        line_shards, line_starts = self._tables(tuple(different.tolist()))
        places = which.reshape(-1) * self.count + places
        slots = np.searchsorted(line_starts, places, side="right") - 1
        return line_shards[slots], places - line_starts[slots]

    def _lay_out(self, epochs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The shards of the epochs in line, one epoch after the other, and where each begins: int64 [epochs x shards].

        A shard without samples begins where the next one does, and a search from the right passes it over.
        """
        num_shards = self.counts.size
        line = np.tile(np.arange(num_shards), len(epochs))
        keys = hash_keys(self.seed, _SHARDS, np.repeat(np.array(epochs, dtype=np.int64), num_shards))
        shards = permute(line, num_shards, keys, bits_for(num_shards))
        return shards, np.cumsum(self.counts[shards]) - self.counts[shards]


def _ranges(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges of these lengths laid end to end: which range an element is in, and its place in it."""
    which = np.repeat(np.arange(lengths.size), lengths)
    return which, np.arange(which.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
