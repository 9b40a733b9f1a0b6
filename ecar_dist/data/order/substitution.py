"""Replace bad samples with good ones: only on request, reproducibly, up to a limit, and each replacement is listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.data.order.stream import Locations, SampleStream
from ecar_dist.errors import DataError

# Makes the permutation that the substitutes come from differ from that of the order.
_KEY = 0x5ABD1 << 40


class BadSamples(DataError):
    """Some samples of a read cannot be used. `reasons` maps their indices in the read to the reasons.

    With `whole_shards`, every sample of their shards is bad.
    """

    def __init__(self, reasons: Mapping[int, str], *, whole_shards: bool) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = dict(reasons)
        self.whole_shards = whole_shards


@dataclass(frozen=True)
class Substitution:
    """The sample `replaced_by` was read at `position` instead of `sample_id`, because of `reason`."""

    position: int
    sample_id: int
    replaced_by: int
    reason: str


class Substitutes:
    """Replaces bad samples with others from the same source, as a pure function of (seed, position, attempt).

    With `max_bad` 0, nothing is replaced and the first bad sample is an error.
    """

    def __init__(self, stream: SampleStream, seed: int, max_bad: float) -> None:
        self._stream = stream
        self._seed = seed
        self._max_bad = max_bad
        # For each source, the number of bad samples by (shard,) or (shard, row).
        self._bad: list[dict[tuple[int, ...], int]] = [{} for _ in stream.orders]
        self._made: list[Substitution] = []
        self._attempts: dict[int, int] = {}  # by position

    def replace(self, locations: Locations, error: BadSamples) -> Locations:
        """The same positions with other samples, which may be bad too. Raises DataError above the limit."""
        if not self._max_bad:
            raise DataError(f"{error}, or set data.on_bad=substitute")

        # Count first: above the limit the run ends and nothing is replaced.
        for index in error.reasons:
            self._count_bad(locations, index, error)
        bad = sum(sum(of_source.values()) for of_source in self._bad)
        total = self._stream.count
        if bad > self._max_bad * total:
            raise DataError(
                f"{error}; with it {bad} of {total} samples are bad, but data.max_bad={self._max_bad:g} allows "
                f"{int(self._max_bad * total)}; restore the data, or raise data.max_bad"
            )

        # A copy: the caller's locations stay as they are.
        replaced = locations.take(np.arange(len(locations)))
        for index, reason in error.reasons.items():
            self._replace_one(replaced, index, reason)
        return replaced

    def take(self) -> tuple[Substitution, ...]:
        """The substitutions since the last call. Call it only when the read of their positions is complete: a later
        `replace` of the same position starts again with attempt 0."""
        made = tuple(self._made)
        self._made = []
        self._attempts = {}
        return made

    def _count_bad(self, locations: Locations, index: int, error: BadSamples) -> None:
        """Raises DataError if no good sample of the source is left."""
        source = int(locations.sources[index])
        shard = int(locations.shards[index])
        order = self._stream.orders[source]
        bad = self._bad[source]

        # The keys make sure that a sample that is read again in a later epoch counts only once.
        if error.whole_shards:
            bad[shard,] = int(order.counts[shard])
        else:
            bad[shard, int(locations.rows[index])] = 1

        # Otherwise the search for a good sample would not end.
        if sum(bad.values()) == order.count:
            raise DataError(f"{error}; with it all {order.count} samples of its set are bad; restore the set")

    def _replace_one(self, locations: Locations, index: int, reason: str) -> None:
        position = int(locations.positions[index])
        source = int(locations.sources[index])
        old_id = int(locations.sample_ids[index])

        # Each attempt is a separate epoch in a permutation of the source, so attempts differ from each other.
        attempt = self._attempts.get(position, -1) + 1
        self._attempts[position] = attempt
        count = self._stream.orders[source].count
        draw = np.array([attempt * count + position % count], dtype=np.int64)
        sample_index = int(sample_indices(draw, count, self._seed ^ _KEY)[0])

        # The positions stay the same. Only the samples that are read for them change.
        shard, row, sample_id = self._stream.locate_sample(source, sample_index)
        locations.shards[index] = shard
        locations.rows[index] = row
        locations.sample_ids[index] = sample_id
        self._made.append(Substitution(position, old_id, sample_id, reason))
