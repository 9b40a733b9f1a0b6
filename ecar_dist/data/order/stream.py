"""From positions of the run to samples: the mixing of sources, and the order of each source, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecar_dist.data.order.lanes import LaneOrder, default_lanes
from ecar_dist.data.order.mixing import Buckets, Mixture


@dataclass(frozen=True)
class Locations:
    """Where the samples at some positions are: source, shard in the source, row in the shard. All int64 [n].

    `sample_ids` number the samples of all sources in one sequence, source after source.
    """

    positions: np.ndarray
    sources: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    sample_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, which: slice | np.ndarray) -> Locations:
        return Locations(
            self.positions[which], self.sources[which], self.shards[which], self.rows[which], self.sample_ids[which]
        )


class SampleStream:
    """The endless order of samples over `sources`. Each source is given by the sample counts of its shards.

    One source: its LaneOrder. Several: mixed in exact proportions by `weights`, either sample by sample, or with
    `by_step` a whole global batch from one source, so that sources may differ in shape.
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
        # Each source has a seed of its own: two sources with equal shards are shuffled differently.
        self.orders = [
            LaneOrder(counts, seed + index, lanes or default_lanes(len(counts)), window_shards)
            for index, counts in enumerate(sources)
        ]

        # Which source a position reads from. Unused for one source.
        self._global_batch_size = global_batch_size
        self._split: Buckets | Mixture = Mixture(weights, seed)
        if by_step:
            self._split = Buckets([order.count for order in self.orders], seed, global_batch_size, weights)

        # Sample ids count through the sources: those of source i begin at _first_id[i].
        self._first_id = np.cumsum([0, *(order.count for order in self.orders)])  # [sources + 1]

    def locate(self, positions: np.ndarray) -> Locations:
        """The location of each position, int64 [n] in any order."""
        # One source needs no mixing: its stream is the run's.
        if len(self.orders) == 1:
            shards, rows = self.orders[0].locate(positions)
            sources = np.zeros(len(positions), dtype=np.int64)
            return Locations(positions, sources, shards, rows, self.orders[0].first_index[shards] + rows)

        # Each source looks up its own positions; the results go back to where the positions were.
        sources, inner = self._split.split(positions)
        shards, rows, sample_ids = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        for source, order in enumerate(self.orders):
            mine = sources == source
            shards[mine], rows[mine] = order.locate(inner[mine])
            sample_ids[mine] = self._first_id[source] + order.first_index[shards[mine]] + rows[mine]
        return Locations(positions, sources, shards, rows, sample_ids)

    def locate_sample(self, source: int, sample_index: int) -> tuple[int, int, int]:
        """(shard, row, sample id) of one sample of one source."""
        # The last shard that begins at or before the sample.
        order = self.orders[source]
        shard = int(np.searchsorted(order.first_index, sample_index, side="right")) - 1
        row = sample_index - int(order.first_index[shard])
        return shard, row, int(self._first_id[source]) + sample_index

    def upcoming(self, start: int, stop: int, ranks: Sequence[int], world_size: int) -> list[list[int]]:
        """For each source, the shards that `ranks` may need for positions in [start, stop), ordered by first use."""
        if len(self.orders) == 1:
            return [self.orders[0].upcoming(start, stop, ranks, world_size)]

        # Mixed sample by sample, the positions of a rank fall on every lane of every source, so ask for all ranks.
        if isinstance(self._split, Mixture):
            ranks = (0,)
            world_size = 1

        # Each source reads a range of its own stream.
        begins = self._split.consumed(start).tolist()
        ends = self._split.consumed(stop).tolist()
        return [
            order.upcoming(begin, end, ranks, world_size)
            for order, begin, end in zip(self.orders, begins, ends, strict=True)
        ]

    def batch_spread(self, batches: int = 4) -> float:
        """A measure of the shuffle: distinct shards in a global batch, averaged over the first batches of the run."""
        # Number the shards of all sources without overlap, then count them in each batch.
        locations = self.locate(np.arange(batches * self._global_batch_size))
        shards = (locations.shards * len(self.orders) + locations.sources).reshape(batches, -1)
        return float(np.mean([np.unique(batch).size for batch in shards]))

    @property
    def count(self) -> int:
        """Samples of all sources together."""
        return int(self._first_id[-1])

    @property
    def window(self) -> int:
        """Positions in which every lane of every source advances by about one window.

        For several sources this assumes that their weights are proportional to their sizes.
        """
        return sum(-(-order.count // order.windows) for order in self.orders)

    def describe(self) -> dict[str, Any]:
        """What the order depends on besides the data sets: JSON values, part of the identity of a run."""
        orders = [order.describe() for order in self.orders]
        return orders[0] if len(orders) == 1 else {"sources": orders, **self._split.describe()}
