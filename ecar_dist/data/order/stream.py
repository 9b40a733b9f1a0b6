"""From positions of the run to samples: combines the mixing of sources with the order of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecar_dist.data.order.lanes import LaneOrder, default_lanes, rank_positions
from ecar_dist.data.order.mixing import Buckets, EvenMixture, Mixture, whole_weights
from ecar_dist.data.order.shares import LaneShares, batch_counts, lanes_for


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


@dataclass(frozen=True)
class OrderMade:
    """How an order is made. A run keeps the choice of its first attempt, even if its batch size changes later.

    batch: the global batch size that the lanes were chosen for; 0 for the first version of the order.
    """

    batch: int

    @property
    def is_first(self) -> bool:
        return self.batch == 0

    def lanes(self, num_shards: int, count: int) -> int:
        """Lanes of a source with `count` samples in each batch."""
        return default_lanes(num_shards) if self.is_first else lanes_for(num_shards, count, self.batch)

    @staticmethod
    def recorded(data: Mapping[str, Any]) -> OrderMade | None:
        """How the order in the identity of a checkpoint was made; None if the identity names no known order."""
        batch = data.get("data_order.batch", 0)
        return OrderMade(batch) if isinstance(batch, int) and batch >= 0 and "data_order.name" in data else None


class SampleStream:
    """The endless order of samples over `sources`. Each source is given by the sample counts of its shards.

    One source: its LaneOrder. Several: mixed in exact proportions by `weights`, sample by sample. With `by_step`, each
    global batch comes from one source, so that sources may differ in shape.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int] | np.ndarray],
        *,
        seed: int,
        global_batch_size: int,
        weights: Sequence[float] = (1.0,),
        by_step: bool = False,
        lanes: int | None = None,
        window_shards: int = 4,
        made: OrderMade | None = None,
    ) -> None:
        """made: how the order of an earlier attempt was made; None: the current way, for this global batch size."""
        self.made = made or OrderMade(global_batch_size)
        self._global_batch_size = global_batch_size

        # Which source a position reads from. Unused for one source.
        self._split: Buckets | Mixture | EvenMixture
        counts = [self.made.batch] * len(sources)  # samples of each source in a batch that contains it
        if by_step:
            self._split = Buckets([int(np.sum(shards)) for shards in sources], seed, global_batch_size, weights)
        elif self.made.is_first or len(sources) == 1:
            self._split = Mixture(weights, seed)
        else:
            chosen = batch_counts(weights, self.made.batch)
            self._split = EvenMixture(chosen or whole_weights(weights, 4096), seed)
            counts = chosen or counts

        # Each source has its own seed, so two sources with equal shards are shuffled differently.
        self.orders = [
            LaneOrder(
                shards,
                seed + index,
                lanes or self.made.lanes(len(shards), counts[index]),
                window_shards,
                endless=not self.made.is_first,
            )
            for index, shards in enumerate(sources)
        ]
        self._shares = [] if self.made.is_first else self._make_shares()

        # Sample ids number the samples source by source: those of source i begin at _first_id[i].
        self._first_id = np.cumsum([0, *(order.count for order in self.orders)])  # [sources + 1]

    def _make_shares(self) -> list[LaneShares]:
        """The parts of a batch: one for all sources, one per source if by step. Empty if lanes do not divide it."""
        batch = self._global_batch_size
        lanes = [order.lanes for order in self.orders]
        if isinstance(self._split, EvenMixture):
            blocks, rest = divmod(batch, self._split.block)
            counts = [weight * blocks for weight in self._split.weights]
            fits = not rest and not any(count % number for count, number in zip(counts, lanes, strict=True))
            return [LaneShares(counts, lanes)] if fits else []
        return [] if any(batch % number for number in lanes) else [LaneShares([batch], [number]) for number in lanes]

    def _shares_at(self, step_start: int) -> tuple[LaneShares, int, np.ndarray] | None:
        """The parts of the batch that begins at `step_start`, its first source, and how far each source is then.

        None if the ranks take turns sample by sample instead. That is always correct, but may read more.
        """
        if not self._shares:
            return None
        if len(self.orders) == 1:
            return self._shares[0], 0, np.array([step_start])
        if isinstance(self._split, Buckets):
            if step_start % self._global_batch_size:
                return None
            bucket, inside = self._split.split(np.array([step_start]))
            return self._shares[int(bucket[0])], int(bucket[0]), inside
        assert isinstance(self._split, EvenMixture)
        if step_start % self._split.block:
            return None
        return self._shares[0], 0, self._split.consumed(step_start)

    def rank_positions(self, step_start: int, rank: int, world_size: int) -> np.ndarray:
        """Positions of one rank in the global batch that begins at `step_start`, ascending: int64 [batch / ranks]."""
        found = self._shares_at(step_start)
        if found is None:
            return rank_positions(step_start, self._global_batch_size, rank, world_size)
        shares, first_source, begins = found
        return self._positions_in(shares, first_source, np.array([step_start]), begins[None], rank, world_size)

    def positions_of_steps(self, step_starts: Sequence[int], rank: int, world_size: int) -> np.ndarray:
        """`rank_positions` of several steps, laid end to end: int64 [steps x batch / ranks]."""
        # Most of the time is spent in numpy calls, so the steps that have the same shares are computed together.
        found = [self._shares_at(start) for start in step_starts]
        first = found[0]
        if first is None or any(one is None or one[0] is not first[0] for one in found):
            return np.concatenate([self.rank_positions(start, rank, world_size) for start in step_starts])
        begins = np.array([one[2] for one in found if one is not None])  # [steps, sources]
        return self._positions_in(first[0], first[1], np.array(step_starts), begins, rank, world_size)

    def _positions_in(
        self,
        shares: LaneShares,
        first_source: int,
        step_starts: np.ndarray,
        begins: np.ndarray,
        rank: int,
        world_size: int,
    ) -> np.ndarray:
        """Positions of a rank in the steps that begin at `step_starts`, by these shares; ascending in each step.

        begins: how far the sources of the shares are at each step, int64 [steps, sources].
        """
        # The positions of the rank's samples in their source's own stream: the next turns of their lanes. [steps, n]
        sources, offsets = shares.of_rank(rank, world_size)
        lanes = np.array([order.lanes for order in self.orders])[first_source + sources]
        turns, lane = np.divmod(offsets, lanes)
        begin = begins[:, sources]
        inside = begin + (lane - begin) % lanes + turns * lanes

        # Then their positions in the run.
        if isinstance(self._split, EvenMixture):
            every = np.broadcast_to(sources, inside.shape)
            positions = self._split.positions(every.reshape(-1), inside.reshape(-1)).reshape(inside.shape)
        else:
            positions = step_starts[:, None] + inside - begin
        return np.sort(positions, axis=1).reshape(-1)

    def locate(self, positions: np.ndarray) -> Locations:
        """The location of each position, int64 [n] in any order."""
        # One source needs no mixing: its stream is the run's.
        if len(self.orders) == 1:
            shards, rows = self.orders[0].locate(positions)
            sources = np.zeros(len(positions), dtype=np.int64)
            return Locations(positions, sources, shards, rows, self.orders[0].first_index[shards] + rows)

        # Each source looks up its own positions. The results are put back in the order of the positions.
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
        """For each source, the shards that `ranks` may need for positions in [start, stop), ordered by first use.

        A batch must begin at `start`.
        """
        if self._shares_at(start) is None:
            return self._upcoming_in_turns(start, stop, [(start + rank) % world_size for rank in ranks], world_size)

        # Every batch has the same lanes. If by step, each source has its own batches.
        by_step = len(self._shares) > 1
        lanes = [share.lanes_of(ranks, world_size) for share in self._shares]
        lanes_of = [found[0] for found in lanes] if by_step else lanes[0]
        begins, ends = [start], [stop]
        if len(self.orders) > 1:
            block = 1 if isinstance(self._split, Buckets) else self._split.block
            begins = self._split.consumed(start).tolist()
            ends = self._split.consumed(-(-stop // block) * block).tolist()
        ranges = zip(self.orders, begins, ends, lanes_of, strict=True)
        return [order.upcoming_of(begin, end, mine) for order, begin, end, mine in ranges]

    def _upcoming_in_turns(self, start: int, stop: int, residues: Sequence[int], world_size: int) -> list[list[int]]:
        """`upcoming` if the ranks take turns: all positions t of a rank have the same t % world_size."""
        if len(self.orders) == 1:
            return [self.orders[0].upcoming(start, stop, residues, world_size)]

        # Mixed sample by sample, the positions of a rank fall on every lane of every source, so ask for all ranks.
        block = 1
        if not isinstance(self._split, Buckets):
            residues = (0,)
            world_size = 1
            block = self._split.block if isinstance(self._split, EvenMixture) else 1

        # Each source reads a range of its own stream.
        begins = self._split.consumed(start).tolist()
        ends = self._split.consumed(-(-stop // block) * block).tolist()
        return [
            order.upcoming(begin, end, residues, world_size)
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
        facts = orders[0] if len(orders) == 1 else {"sources": orders, **self._split.describe()}
        return facts if self.made.is_first else {**facts, "batch": self.made.batch}
