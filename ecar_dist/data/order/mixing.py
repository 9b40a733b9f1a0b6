"""Several sources in one order: which source gives the sample at a position, and how far into that source it is.

Pure functions of (seed, position), like the order inside a source. Positions come in blocks; every block holds each
source exactly as often as its whole-number weight says, in a keyed order of its own. So proportions are exact, any
position can be looked up without the ones before it, and a source's own stream 0, 1, 2, ... has no gap and no repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute
from ecar_dist.errors import ConfigError

_MIX = int.from_bytes(b"mix", "big")  # what a key is for
_CACHED_TABLES = 4


class Mixture:
    """Sources mixed sample by sample. `weights` become whole numbers, see `whole_weights`; their sum is the block.

    Raises ConfigError where a weight is not a positive number, or too small for a block of `total` positions.
    """

    name = "mixture-v1"

    def __init__(self, weights: Sequence[float], seed: int, total: int = 4096) -> None:
        self.weights, self.seed = whole_weights(weights, total), seed
        self.block = sum(self.weights)
        self._per_block = np.array(self.weights, dtype=np.int64)
        sources = np.arange(len(self.weights), dtype=np.min_scalar_type(len(self.weights)))  # small: sorts by radix
        self._sorted_sources = np.repeat(sources, self._per_block)  # [block]
        before = np.cumsum(self._per_block) - self._per_block
        self._sorted_ranks = np.arange(self.block) - np.repeat(before, self._per_block)  # [block]
        self._tables = lru_cache(maxsize=_CACHED_TABLES)(self._mix_blocks)

    def describe(self) -> dict[str, Any]:
        """What the mixing depends on besides the sources and their order: JSON values, part of a run's identity."""
        return {"name": self.name, "seed": self.seed, "weights": list(self.weights)}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and position in that source's own endless stream, for each position: int64, in its shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.weights) == 1:
            return np.zeros_like(positions), positions.copy()
        blocks, places = np.divmod(positions.reshape(-1), self.block)
        different, which = np.unique(blocks, return_inverse=True)
        mixed, ranks = self._tables(tuple(different.tolist()))
        sources = mixed[which.reshape(-1), places].astype(np.int64)
        inside = blocks * self._per_block[sources] + ranks[which.reshape(-1), places]
        return sources.reshape(positions.shape), inside.reshape(positions.shape)

    def consumed(self, position: int) -> np.ndarray:
        """How many samples of each source lie before the position: int64 [sources].

        Positions [start, stop) take [consumed(start), consumed(stop)) of every source's stream: what to prefetch.
        """
        block, place = divmod(position, self.block)
        mixed, _ = self._tables((block,))
        return block * self._per_block + np.bincount(mixed[0, :place], minlength=len(self.weights))

    def _mix_blocks(self, blocks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """[blocks, block]: the source of each place, and how many places before it in the block have the same."""
        keys = hash_keys(self.seed, _MIX, np.repeat(np.array(blocks, dtype=np.int64), self.block))
        slots = permute(np.tile(np.arange(self.block), len(blocks)), self.block, keys, bits_for(self.block))
        mixed = self._sorted_sources[slots].reshape(len(blocks), self.block)
        places = np.argsort(mixed, axis=1, kind="stable")  # first all places of source 0, in order, then of source 1
        ranks = np.empty_like(places)
        np.put_along_axis(ranks, places, np.broadcast_to(self._sorted_ranks, places.shape), axis=1)
        return mixed, ranks


class Buckets:
    """Sources of different shapes: all samples of one global step come from one bucket, the same on every rank.

    The steps are mixed by `weights`, which default to the sizes of the buckets; a bucket's samples come in its own
    order, a whole global batch at a time, so position % world_size is the same in the run and in the bucket.
    """

    name = "buckets-v1"

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        global_batch_size: int,
        weights: Sequence[float] | None = None,
        total: int = 4096,
    ) -> None:
        if weights is not None and len(weights) != len(sizes):
            raise ConfigError(f"{len(weights)} weights for {len(sizes)} buckets; give each bucket one, or none at all")
        self._steps = Mixture(sizes if weights is None else weights, seed, total)
        self.global_batch_size = global_batch_size

    def describe(self) -> dict[str, Any]:
        """As in `Mixture`. The global batch size belongs to it: with another, a position is in another step."""
        return {**self._steps.describe(), "name": self.name, "global_batch_size": self.global_batch_size}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bucket, and position in that bucket's own endless stream, for each position: int64, in its shape."""
        steps, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.global_batch_size)
        buckets, earlier_steps = self._steps.split(steps)
        return buckets, earlier_steps * self.global_batch_size + offsets

    def consumed(self, position: int) -> np.ndarray:
        """As in `Mixture`: how many samples of each bucket lie before the position, int64 [buckets]."""
        step, offset = divmod(position, self.global_batch_size)
        before, after = self._steps.consumed(step), self._steps.consumed(step + 1)
        return before * self.global_batch_size + (after - before) * offset


def whole_weights(weights: Sequence[float], total: int) -> list[int]:
    """The least whole numbers in the proportion of the weights, read as the decimals they are written as.

    Where their sum would be above `total`, the nearest ones with that sum, by largest remainder. Raises ConfigError.
    """
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"weight {source} is {weight}; every source needs a weight above 0, or must be left out")
    if not weights:
        raise ConfigError("0 sources to mix; name 1 or more")
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = _divide_by_gcd([int(weight * denominator) for weight in exact])
    return whole if sum(whole) <= total else _divide_by_gcd(_largest_remainder(whole, total))


def _divide_by_gcd(numbers: list[int]) -> list[int]:
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def _largest_remainder(weights: list[int], total: int) -> list[int]:
    """Whole shares of `total`: rounded down, and what is left goes one each to the largest remainders."""
    whole = sum(weights)
    shares = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda source: -(weights[source] * total % whole))
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    if 0 in shares:
        source = shares.index(0)
        raise ConfigError(
            f"weight {source} is {weights[source] / whole:.2g} of the sum and has 0 places in a block of {total}; "
            f"raise it to 1/{total} of the sum or more, or leave the source out"
        )
    return shares
