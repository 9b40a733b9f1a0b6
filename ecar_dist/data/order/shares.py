"""Which samples of a global batch each rank reads, so that every node reads few shards.

A position belongs to a lane of a source (`lanes.py`). In the second version of the order, every lane has the same
number of samples in each global batch. So the samples of a batch are sorted by lane once, and each rank always takes
the same part of them. The ranks of a node are consecutive, so they read consecutive lanes, whose shards are neighbours.

    batch of 8, 4 lanes       lane   0 0 1 1 2 2 3 3
    2 ranks                   rank   0 0 0 0 1 1 1 1

Several sources are merged by the relative place of their samples, so each rank reads the same part of every source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecar_dist.data.order.lanes import SHARDS_PER_LANE, default_lanes
from ecar_dist.data.order.mixing import largest_remainder, whole_weights
from ecar_dist.errors import ConfigError

MAX_NODES = 512  # the largest number of nodes that is considered below
_MAX_LANES = 4096
_MAX_ERROR = 0.005  # relative error of a source's part of the batch
_EXACT = 1 << 40  # a limit for the sum of whole weights, up to which they are not rounded
_POOR_SHUFFLE = 8  # times fewer lanes than by default


class LaneShares:
    """Each rank's part of a global batch that has `counts[s]` samples of source s, in `lanes[s]` lanes.

    Each number of lanes must divide its count. Memory: 16 bytes for each sample of the batch.
    """

    def __init__(self, counts: Sequence[int], lanes: Sequence[int]) -> None:
        self._lanes = np.array(lanes, dtype=np.int64)  # [sources]
        turns = np.array(counts, dtype=np.int64) // self._lanes  # of each lane in a batch

        # The samples of each source, sorted by lane and turn. [batch]
        sources = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        lane, turn = np.divmod(ranks, turns[sources])

        # Merge the sources.
        place = (ranks + 0.5) / np.array(counts)[sources]
        merged = np.argsort(place, kind="stable")
        self._sources = sources[merged]
        self._offsets = (lane + turn * self._lanes[sources])[merged]

    def of_rank(self, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample of a rank, and its offset in that source's part of the batch: int64 [batch / ranks].

        The lane is the offset modulo the source's lanes.
        """
        size = len(self._sources) // world_size
        part = slice(rank * size, (rank + 1) * size)
        return self._sources[part], self._offsets[part]

    def lanes_of(self, ranks: Sequence[int], world_size: int) -> list[np.ndarray]:
        """For each source, the lanes that the ranks read, ascending."""
        parts = [self.of_rank(rank, world_size) for rank in ranks]
        sources = np.concatenate([part[0] for part in parts])
        offsets = np.concatenate([part[1] for part in parts])
        return [np.unique(offsets[sources == source] % lanes) for source, lanes in enumerate(self._lanes.tolist())]


def node_multiple(batch: int) -> int:
    """The least common multiple of the numbers of nodes that divide the batch, up to MAX_NODES. Divides the batch."""
    return math.lcm(*(nodes for nodes in range(1, MAX_NODES + 1) if batch % nodes == 0))


def lanes_for(num_shards: int, count: int, batch: int) -> int:
    """Lanes of a source that has `count` samples in each global batch of `batch`: a divisor of the count.

    Each lane gets about four shards. If there are enough shards, every number of nodes that divides the batch also
    divides the number of lanes, so no two nodes read the same lane. For a count without a suitable divisor, the result
    is the number of lanes in the first version of the order; nodes then read more than they need.
    """
    limit = max(1, min(_MAX_LANES, num_shards // SHARDS_PER_LANE))
    fitting = [lanes for lanes in range(1, limit + 1) if count % lanes == 0]
    multiple = node_multiple(batch)
    lanes = max([lanes for lanes in fitting if lanes % multiple == 0] or fitting)
    usual = default_lanes(num_shards)
    return usual if lanes * _POOR_SHUFFLE < min(usual, count) else lanes


def batch_counts(weights: Sequence[float], batch: int) -> list[int] | None:
    """Samples of each source in every global batch, proportional to the weights within 0.5 %; None if impossible.

    They are multiples of `node_multiple` if possible. Otherwise it is halved until its multiples are fine enough.
    """
    exact = whole_weights(weights, _EXACT)
    unit = node_multiple(batch)
    whole = [weight / sum(weights) * batch for weight in weights]
    if batch % sum(exact) == 0 and batch // sum(exact) % unit == 0:
        return [weight * (batch // sum(exact)) for weight in exact]
    while True:
        try:
            counts = [unit * share for share in largest_remainder(exact, batch // unit)]
            if all(abs(count - wanted) <= _MAX_ERROR * wanted for count, wanted in zip(counts, whole, strict=True)):
                return counts
        except ConfigError:
            pass  # a source has no place
        if unit == 1:
            return None
        unit = unit // 2 if unit % 2 == 0 else 1
