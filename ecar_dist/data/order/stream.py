"""Which sample of which shard stands at a position of the run: the orders of one or several sources, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecar_dist.data.order.lanes import LaneOrder, default_lanes
from ecar_dist.data.order.mixing import Buckets, Mixture


@dataclass(frozen=True)
class Places:
    """Where the samples at some positions lie; all int64 [n]. `sample_ids` count through all sources."""

    positions: np.ndarray
    sources: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    sample_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, which: slice | np.ndarray) -> Places:
        return Places(
            self.positions[which], self.sources[which], self.shards[which], self.rows[which], self.sample_ids[which]
        )


class SampleStream:
    """The endless order of samples over `sources`, each given by the sample counts of its shards.

    One source: its own LaneOrder. Several: exact proportions by `weights`, sample by sample, or with `by_step` a whole
    global batch from one source, so that sources may differ in shape.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        *,
        seed: int,
        global_batch_size: int,
        weights: Sequence[float] = (1.0,),
        by_step: bool = False,
        lanes: int | None = None,
        window_shards: int = 4,
    ) -> None:
        self.orders = [
            LaneOrder(counts, seed + place, lanes or default_lanes(len(counts)), window_shards)
            for place, counts in enumerate(sources)
        ]
        self._global_batch_size = global_batch_size
        self._split: Buckets | Mixture = Mixture(weights, seed)
        if by_step:
            self._split = Buckets([order.count for order in self.orders], seed, global_batch_size, weights)
        self._firsts = np.cumsum([0, *(order.count for order in self.orders)])  # sample id of each source's sample 0

    def locate(self, positions: np.ndarray) -> Places:
        """The place of each position, int64 [n] in any order."""
        if len(self.orders) == 1:
            shards, rows = self.orders[0].locate(positions)
            zeros = np.zeros(len(positions), dtype=np.int64)
            return Places(positions, zeros, shards, rows, self.orders[0].first_index[shards] + rows)
        sources, inner = self._split.split(positions)
        shards, rows, ids = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        for source, order in enumerate(self.orders):
            mine = sources == source
            shards[mine], rows[mine] = order.locate(inner[mine])
            ids[mine] = self._firsts[source] + order.first_index[shards[mine]] + rows[mine]
        return Places(positions, sources, shards, rows, ids)

    def place_of(self, source: int, sample_index: int) -> tuple[int, int, int]:
        """(shard, row, sample id) of one sample of one source."""
        order = self.orders[source]
        shard = int(np.searchsorted(order.first_index, sample_index, side="right")) - 1
        return shard, sample_index - int(order.first_index[shard]), int(self._firsts[source]) + sample_index

    def upcoming(self, start: int, stop: int, ranks: Sequence[int], world_size: int) -> list[list[int]]:
        """For each source the shards that `ranks` may touch at positions [start, stop), in order of first use."""
        if len(self.orders) == 1:
            return [self.orders[0].upcoming(start, stop, ranks, world_size)]
        begins, ends = self._split.consumed(start).tolist(), self._split.consumed(stop).tolist()
        if isinstance(self._split, Mixture):
            ranks, world_size = (0,), 1  # a rank's positions fall on every lane of every source
        return [
            order.upcoming(begin, end, ranks, world_size)
            for order, begin, end in zip(self.orders, begins, ends, strict=True)
        ]

    def batch_spread(self, batches: int = 4) -> float:
        """How well the order shuffles: distinct shards in a global batch, the mean over the run's first batches."""
        places = self.locate(np.arange(batches * self._global_batch_size))
        shards = (places.shards * len(self.orders) + places.sources).reshape(batches, -1)
        return float(np.mean([np.unique(batch).size for batch in shards]))

    @property
    def count(self) -> int:
        """Samples of all sources together."""
        return int(self._firsts[-1])

    @property
    def window(self) -> int:
        """Positions of the run in which every lane of every source goes through about one window (where the weights of
        several sources are their sizes)."""
        return sum(-(-order.count // order.windows) for order in self.orders)

    def describe(self) -> dict[str, Any]:
        """What decides the order, for the run's identity: JSON values by name."""
        orders = [order.describe() for order in self.orders]
        return orders[0] if len(orders) == 1 else {"sources": orders, **self._split.describe()}
