"""Other samples in the place of damaged ones: only when asked for, always the same ones, counted, listed, bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.data.order.stream import Places, SampleStream
from ecar_dist.errors import DataError

_KEY = 0x5ABD1 << 40  # sets the substitutes' permutation apart from the order's


class BadSamples(DataError):
    """Some places of a read cannot be used: `reasons` by place. With `whole_shards` nothing of their shards can."""

    def __init__(self, reasons: Mapping[int, str], *, whole_shards: bool) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons, self.whole_shards = dict(reasons), whole_shards


@dataclass(frozen=True)
class Substitution:
    """The sample `replaced_by` was read at `position` instead of `sample_id`, for `reason`."""

    position: int
    sample_id: int
    replaced_by: int
    reason: str


class Substitutes:
    """Replaces bad samples by others of the same source, a pure function of (seed, position, attempt).

    With `max_bad` 0 nothing is replaced: the first bad sample is an error.
    """

    def __init__(self, stream: SampleStream, seed: int, max_bad: float) -> None:
        self._stream, self._seed, self._max_bad = stream, seed, max_bad
        self._lost: list[dict[tuple[int, ...], int]] = [{} for _ in stream.orders]  # samples, by shard or (shard, row)
        self._made: list[Substitution] = []
        self._attempts: dict[int, int] = {}  # by position

    def replace(self, places: Places, error: BadSamples) -> Places:
        """The same positions with other samples, which may be bad too. Raises DataError past the bound."""
        if not self._max_bad:
            raise DataError(f"{error}, or set data.on_bad=substitute")
        for at in error.reasons:
            self._count_lost(places, at, error)
        lost, total = sum(sum(lost.values()) for lost in self._lost), self._stream.count
        if lost > self._max_bad * total:
            raise DataError(
                f"{error}; with it {lost} of {total} samples are bad, data.max_bad allows {self._max_bad:g} of them"
            )
        replaced = places.take(np.arange(len(places)))  # a copy
        for at, reason in error.reasons.items():
            self._replace_one(replaced, at, reason)
        return replaced

    def take(self) -> tuple[Substitution, ...]:
        """What was replaced since the last call. Its positions must be done with: they would begin at attempt 0."""
        made, self._made, self._attempts = tuple(self._made), [], {}
        return made

    def _count_lost(self, places: Places, at: int, error: BadSamples) -> None:
        """Raises DataError where nothing of the source is left to replace with."""
        source, shard, row = int(places.sources[at]), int(places.shards[at]), int(places.rows[at])
        order, lost = self._stream.orders[source], self._lost[source]
        if error.whole_shards:
            lost[shard,] = int(order.counts[shard])
        else:
            lost[shard, row] = 1
        if sum(lost.values()) == order.count:
            raise DataError(f"{error}; with it all {order.count} samples of its set are bad; restore the set")

    def _replace_one(self, places: Places, at: int, reason: str) -> None:
        position, source, old = int(places.positions[at]), int(places.sources[at]), int(places.sample_ids[at])
        attempt = self._attempts[position] = self._attempts.get(position, -1) + 1
        count = self._stream.orders[source].count
        draw = np.array([attempt * count + position % count], dtype=np.int64)  # an epoch of its own for each attempt
        index = int(sample_indices(draw, count, self._seed ^ _KEY)[0])
        places.shards[at], places.rows[at], places.sample_ids[at] = self._stream.place_of(source, index)
        self._made.append(Substitution(position, old, int(places.sample_ids[at]), reason))
