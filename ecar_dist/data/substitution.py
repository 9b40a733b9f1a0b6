"""Other samples in the place of damaged ones: only when asked for, always the same ones, counted, listed, bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ecar_dist.data.order import sample_indices
from ecar_dist.data.stream import Places, SampleStream
from ecar_dist.errors import DataError

_KEY = 0x5ABD1 << 40  # sets the substitutes' permutation apart from the order's


class BadSamples(DataError):
    """Some of the places of a read cannot be used: `reasons` by place.

    Each distinct reason costs the set `lost_each` samples: a whole shard, or one image.
    """

    def __init__(self, reasons: Mapping[int, str], lost_each: int) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons, self.lost_each = dict(reasons), lost_each


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
        self.made: list[Substitution] = []
        self._stream, self._seed, self._max_bad = stream, seed, max_bad
        self._lost: dict[str, int] = {}  # samples that went with each distinct reason
        self._attempts: dict[int, int] = {}  # by position

    def replace(self, places: Places, error: BadSamples) -> Places:
        """The same positions with other samples, which may be bad too. Raises DataError past the bound."""
        self._lost.update(dict.fromkeys(error.reasons.values(), error.lost_each))
        total, lost = sum(order.count for order in self._stream.orders), sum(self._lost.values())
        if lost > self._max_bad * total:
            raise DataError(
                f"{error}; with it {lost} of {total} samples are bad, data.max_bad allows {self._max_bad:g} of them"
                if self._max_bad
                else str(error)
            )
        replaced = places.take(np.arange(len(places)))  # a copy
        for at, reason in error.reasons.items():
            self._replace_one(replaced, at, reason)
        return replaced

    def drain(self) -> list[Substitution]:
        """What was replaced since the last call."""
        made, self.made = self.made, []
        return made

    def _replace_one(self, places: Places, at: int, reason: str) -> None:
        position, source, old = int(places.positions[at]), int(places.sources[at]), int(places.sample_ids[at])
        attempt = self._attempts[position] = self._attempts.get(position, -1) + 1
        count = self._stream.orders[source].count
        draw = np.array([attempt * count + position % count], dtype=np.int64)  # an epoch of its own for each attempt
        index = int(sample_indices(draw, count, self._seed ^ _KEY)[0])
        places.shards[at], places.rows[at], places.sample_ids[at] = self._stream.place_of(source, index)
        self.made.append(Substitution(position, old, int(places.sample_ids[at]), reason))
