"""The order of samples: a pure function of (seed, epoch, position).

Position t = 0, 1, 2, ... counts all samples of the run. Its epoch is t // count and its offset in the epoch is
t % count. The order has these properties:

    exactly once    each epoch is a permutation of the set: nothing is padded, repeated or dropped
    pure            the sample at t depends on the seed and t, not on ranks, batch size or earlier positions
    resumable       the complete state is t; any number of ranks can continue, and a batch may straddle two epochs

A global permutation would have these properties too, but each rank would then read all shards at random. `LaneOrder`
keeps each rank to a few shards at a time:

    line      in each epoch the shards are permuted and laid end to end
    lane      the line is cut into `lanes` ranges of equal length; offset o belongs to lane o % lanes
    window    a lane is read from its start to its end in windows of a few shards; each window has its own
              permutation

Rank r of R takes every R-th position, so if R divides `lanes`, a rank reads the shards of its own lanes only.

Example: shards A, B, C, D of two samples each, 2 lanes, windows of one shard, seed 3, epoch 0:

    line          D0 D1 C0 C1 A0 A1 B0 B1      a permutation of the shards
    lane 0        D0 D1 | C0 C1                two windows of two samples
    lane 1        A0 A1 | B0 B1
    permuted      D0 D1 | C1 C0                each window by its own key
                  A1 A0 | B1 B0
    order         D0 A1 D1 A0 C1 B1 C0 B0      positions 0, 1, 2, ... cycle through the lanes
    rank 0 of 2   D0    D1    C1    C0         opens D, then C
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute
from ecar_dist.errors import ConfigError, DataError

# First fields of the keys that permute the shards of an epoch, and the samples of a window.
_SHARDS = int.from_bytes(b"shards", "big")
_WINDOW = int.from_bytes(b"window", "big")

# Default numbers of lanes. Each divides the next; the last two also serve ranks in multiples of 3 and 5.
_LANES = (1, 2, 4, 8, 16, 32, 64, 192, 960)
SHARDS_PER_LANE = 4

# A batch may straddle two epochs, and prefetching may already be in the next.
_CACHED_TABLES = 4


def sample_indices(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sample index in [0, count) of each position, with one permutation of the whole set per epoch; int64 in and out.

    Data sets are written in this order. Positions may be in any order and from any epochs.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    positions = np.asarray(positions, dtype=np.int64)
    epochs, offsets = np.divmod(positions.reshape(-1), count)
    return permute(offsets, count, hash_keys(seed, epochs), bits_for(count)).reshape(positions.shape)


def rank_positions(step_start: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of one rank in the global batch that begins at `step_start`: every world_size-th, int64."""
    return np.arange(step_start + rank, step_start + global_batch_size, world_size, dtype=np.int64)


def default_lanes(num_shards: int) -> int:
    """The most lanes that leave about four shards for each. Most common numbers of ranks divide one of these."""
    return max(lanes for lanes in _LANES if lanes <= max(1, num_shards // SHARDS_PER_LANE))


class LaneOrder:
    """The order described above, over one set.

    counts: samples of each shard, in the order of the manifest.
    window_shards: the largest size of a window, in units of the largest shard. 0 makes each lane one window.
    endless: the cycle through the lanes does not restart at an epoch: position t, not its offset in the epoch, belongs
        to lane t % lanes. So if `lanes` divides the global batch, every lane has the same places in every batch.

    Attributes: `count`, the number of samples; `first_index`, int64 [shards], the index of each shard's first sample;
    `windows`, the number of windows in a lane. Memory: 16 bytes per shard and cached epoch.

    Raises DataError for an empty set, ConfigError for impossible lanes or windows.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, seed: int, lanes: int, window_shards: int, *, endless: bool = False
    ) -> None:
        self.endless = endless
        self.name = "lanes-feistel-v2" if endless else "lanes-feistel-v1"
        self.counts = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.count = int(self.counts.sum())
        if self.count < 1 or self.counts.min() < 0:
            raise DataError(f"shards with {self.counts.tolist()[:8]} samples: an order needs 1 or more; encode the set")
        if not 1 <= lanes <= self.count:
            raise ConfigError(f"lanes={lanes} for {self.count} samples; set 1 <= lanes <= {self.count}")
        if window_shards < 0:
            raise ConfigError(f"window_shards={window_shards}; set 1 or more shards, or 0 for whole lanes")
        self.seed = seed
        self.lanes = lanes
        self.window_shards = window_shards
        self.first_index = np.cumsum(self.counts) - self.counts

        # Every lane has the same number of windows, and one network is wide enough for the largest of them.
        longest_lane = -(-self.count // lanes)
        longest_window = window_shards * int(self.counts.max()) or longest_lane
        self.windows = -(-longest_lane // longest_window)
        self._bits = bits_for(-(-longest_lane // self.windows))
        self._tables = lru_cache(maxsize=_CACHED_TABLES)(self._lay_out)

    def describe(self) -> dict[str, Any]:
        """What the order depends on besides the data set: JSON values, part of the identity of a run."""
        return {"name": self.name, "seed": self.seed, "lanes": self.lanes, "window_shards": self.window_shards}

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample index in [0, count) of each position, counted in manifest order; int64 in and out."""
        shards, rows = self.locate(positions)
        return self.first_index[shards] + rows

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard of each position, and row in that shard: int64, in the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)

        # Which lane, and which turn of that lane: its 0th, 1st, 2nd ... sample of the epoch. [N]
        epochs, offsets = np.divmod(positions.reshape(-1), self.count)
        turns, places = np.divmod(offsets, self.lanes)
        first = self._first_lane(epochs)
        lanes = (places + first) % self.lanes

        # Permute the turn within its window.
        windows = self._window_of(places, turns)
        begins, ends = self._window_edges(places, windows)
        keys = hash_keys(self.seed, _WINDOW, epochs, lanes, windows)
        turns = begins + permute(turns - begins, ends - begins, keys, self._bits)

        # A lane is a range of the line, so the permuted turn is a point of the line.
        shards, rows = self._look_up(epochs, self._lane_start(lanes, first) + turns)
        return shards.reshape(positions.shape), rows.reshape(positions.shape)

    def upcoming(self, start: int, stop: int, ranks: Sequence[int], world_size: int) -> list[int]:
        """Shards that the ranks need for positions in [start, stop), each once, in the order of first use.

        A rank r has the positions t with t % world_size == r. The result contains all shards of each window that such
        a position is in, in line order within a window. So no shard is missing, but a shard may be listed although none
        of its samples in that window is at these positions. The cost grows with the number of windows, not of samples.
        """
        residues = np.unique(np.asarray(ranks, dtype=np.int64))
        return self._upcoming(start, stop, np.arange(self.lanes), residues, world_size)

    def upcoming_of(self, start: int, stop: int, lanes: np.ndarray) -> list[int]:
        """Shards of these lanes (int64, each once) for positions in [start, stop); otherwise like `upcoming`."""
        return self._upcoming(start, stop, lanes, np.zeros(1, dtype=np.int64), 1)

    def _upcoming(self, start: int, stop: int, lanes: np.ndarray, residues: np.ndarray, modulus: int) -> list[int]:
        first_uses: dict[int, None] = {}  # a dict keeps the order of insertion
        nonempty = int(np.count_nonzero(self.counts))
        for epoch in range(start // self.count, -(-stop // self.count)):
            # The part of [start, stop) in this epoch, and the residues of the ranks, counted from the epoch's start.
            epoch_start = epoch * self.count
            begin = max(start - epoch_start, 0)
            end = min(stop - epoch_start, self.count)
            first = self._first_lane(epoch)
            places = (lanes - first) % self.lanes
            places, windows = self._touched(begin, end, places, (residues - epoch_start) % modulus, modulus)

            first_uses.update(dict.fromkeys(self._shards_of(epoch, places, windows)))
            if len(first_uses) == nonempty:
                break
        return list(first_uses)

    def _first_lane(self, epochs: Any) -> Any:
        """The lane of the first offset of each epoch. The lane at `place` after it is (place + first) % lanes."""
        return epochs * self.count % self.lanes if self.endless else epochs * 0

    def _lane_size(self, places: np.ndarray) -> np.ndarray:
        """The first lanes of an epoch have one sample more, if `lanes` does not divide the count."""
        return self.count // self.lanes + (places < self.count % self.lanes)

    def _lane_start(self, lanes: np.ndarray, first: Any) -> np.ndarray:
        """Start of each lane's range in the line."""
        # The longer lanes begin at `first`, and continue at lane 0 after the last lane.
        longer = self.count % self.lanes
        from_zero = np.maximum(first + longer - self.lanes, 0)
        before = np.clip(lanes - first, 0, longer) + np.minimum(lanes, from_zero)
        return lanes * (self.count // self.lanes) + before

    def _window_edges(self, places: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First turn of each window in its lane, and the turn after its last.

        All windows of an order differ in size by at most one. A short last window would be badly shuffled.
        """
        sizes = self._lane_size(places)
        return windows * sizes // self.windows, (windows + 1) * sizes // self.windows

    def _window_of(self, places: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The window that contains each turn: the least k with turn + 1 <= (k + 1) size / windows."""
        return ((turns + 1) * self.windows - 1) // self._lane_size(places)

    def _touched(
        self, begin: int, end: int, places: np.ndarray, residues: np.ndarray, modulus: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The windows with an offset o in [begin, end) and o % modulus in `residues`, ordered by the first such o.

        places: those of the lanes to look at, see `_first_lane`. Returns the place of each window's lane, and the
        window's number in that lane: int64 [touched windows].
        """
        # The lane at place p has the turns [low, high) in [begin, end): turn q is at offset p + q lanes. [places]
        low = -((places - begin) // self.lanes)
        high = -((places - end) // self.lanes)
        used = low < high
        lanes = places[used]
        low = low[used]
        high = high[used]

        # One entry for each window of each lane, with its range of turns [low, ends). [windows]
        first_window = self._window_of(lanes, low)
        which, step = _ranges(self._window_of(lanes, high - 1) + 1 - first_window)
        lanes = lanes[which]
        windows = first_window[which] + step
        begins, ends = self._window_edges(lanes, windows)
        low = np.maximum(begins, low[which])
        ends = np.minimum(ends, high[which])

        # Which turns q belong to residue r? Those with l + q lanes = r (mod modulus). With g = gcd(lanes, modulus),
        # there are solutions only if g divides r - l. They are modulus / g apart, and one of them is (r - l) / g times
        # the inverse of lanes / g (mod modulus / g).
        divisor = math.gcd(self.lanes, modulus)
        period = modulus // divisor
        quotients, remainders = np.divmod((residues[:, None] - lanes) % modulus, divisor)  # [ranks, windows]
        solution = quotients * pow(self.lanes // divisor, -1, period) % period

        # The first solution at or after `low`, and whether it is still in the window. [ranks, windows]
        turns = low + (solution - low) % period
        touched = (remainders == 0) & (turns < ends)

        # Keep the windows that some rank touches, by first offset. `end` marks the others, which sort last.
        first_offset = np.where(touched, lanes + turns * self.lanes, end).min(axis=0, initial=end)  # [windows]
        by_offset = np.argsort(first_offset, kind="stable")[: np.count_nonzero(first_offset < end)]
        return lanes[by_offset], windows[by_offset]

    def _shards_of(self, epoch: int, places: np.ndarray, windows: np.ndarray) -> Iterator[int]:
        """All shards of the windows, one window after the other. A shard in two windows appears twice."""
        # The slots of the line that contain the first and the last sample of each window.
        begins, ends = self._window_edges(places, windows)
        first_lane = self._first_lane(epoch)
        start = self._lane_start((places + first_lane) % self.lanes, first_lane)
        line_shards, line_starts = self._tables((epoch,))
        first = np.searchsorted(line_starts, start + begins, side="right") - 1
        last = np.searchsorted(line_starts, start + ends - 1, side="right") - 1

        which, step = _ranges(last + 1 - first)
        shards = line_shards[first[which] + step]
        return iter(shards[self.counts[shards] > 0].tolist())

    def _look_up(self, epochs: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each point, which is a place in the line of its epoch; int64 [N] each."""
        # The lines of the different epochs are laid end to end in one table, so one search finds all slots.
        different, which = np.unique(epochs, return_inverse=True)
        line_shards, line_starts = self._tables(tuple(different.tolist()))
        points = which.reshape(-1) * self.count + points
        slots = np.searchsorted(line_starts, points, side="right") - 1
        return line_shards[slots], points - line_starts[slots]

    def _lay_out(self, epochs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The lines of the epochs laid end to end: shard of each slot and start of each slot, int64 [epochs x shards].

        An empty shard starts where the next one does. A search from the right skips it.
        """
        # One key per epoch, repeated for each of its slots.
        num_shards = self.counts.size
        slots = np.tile(np.arange(num_shards), len(epochs))
        keys = hash_keys(self.seed, _SHARDS, np.repeat(np.array(epochs, dtype=np.int64), num_shards))
        shards = permute(slots, num_shards, keys, bits_for(num_shards))
        return shards, np.cumsum(self.counts[shards]) - self.counts[shards]


def _ranges(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges of these lengths laid end to end: the range of each element, and its index in that range."""
    which = np.repeat(np.arange(lengths.size), lengths)
    return which, np.arange(which.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
