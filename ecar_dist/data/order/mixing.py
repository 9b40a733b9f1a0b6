"""Mix several sources: which source has the sample at a position, and at which position of that source's own stream.

Both are pure functions of (seed, position), like the order within a source. Positions come in blocks. With weights 2
and 1, a block has three places, two of source 0 and one of source 1, in an order that is keyed by the block (here with
seed 0):

    position            0  1  2 | 3  4  5 | ...
    source              0  1  0 | 0  0  1 | ...
    inner position      0  0  1 | 2  3  1 | ...     each source's own stream: 0, 1, 2, ... without gaps or repeats

So the proportions are exact in every block, and any position can be looked up without the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute, unpermute
from ecar_dist.errors import ConfigError

# First field of the keys that permute a block.
_MIX = int.from_bytes(b"mix", "big")

# A batch, and the consumed counts around it, may need a few blocks at a time.
_CACHED_TABLES = 4


class Mixture:
    """Sources mixed sample by sample.

    `weights` become whole numbers by `whole_weights`. Their sum, at most `total`, is the number of positions in a
    block. Raises ConfigError for a weight that is not a positive number, or is too small for a block of `total`.
    """

    name = "mixture-v1"

    def __init__(self, weights: Sequence[float], seed: int, total: int = 4096) -> None:
        self.weights = whole_weights(weights, total)
        self.seed = seed
        self.block = sum(self.weights)
        self._per_block = np.array(self.weights, dtype=np.int64)  # [sources]

        # A block before it is shuffled: all places of source 0, then of source 1, ..., and the rank of each place
        # among those of its source. The small dtype lets numpy sort the sources by radix.
        sources = np.arange(len(self.weights), dtype=np.min_scalar_type(len(self.weights)))
        self._sorted_sources = np.repeat(sources, self._per_block)  # [block]
        before = np.cumsum(self._per_block) - self._per_block
        self._sorted_ranks = np.arange(self.block) - np.repeat(before, self._per_block)  # [block]
        self._tables = lru_cache(maxsize=_CACHED_TABLES)(self._mix_blocks)

    def describe(self) -> dict[str, Any]:
        """What the mixing depends on besides the sources: JSON values, part of the identity of a run."""
        return {"name": self.name, "seed": self.seed, "weights": list(self.weights)}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and position in that source's own stream: int64, in the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.weights) == 1:
            return np.zeros_like(positions), positions.copy()

        # Look the positions up in the tables of their blocks.
        blocks, places = np.divmod(positions.reshape(-1), self.block)
        different, which = np.unique(blocks, return_inverse=True)
        mixed, ranks = self._tables(tuple(different.tolist()))
        sources = mixed[which.reshape(-1), places].astype(np.int64)

        # Every earlier block took `_per_block` samples of the source; this one has taken `ranks` so far.
        inside = blocks * self._per_block[sources] + ranks[which.reshape(-1), places]
        return sources.reshape(positions.shape), inside.reshape(positions.shape)

    def consumed(self, position: int) -> np.ndarray:
        """Samples of each source before the position: int64 [sources].

        Positions [start, stop) read [consumed(start), consumed(stop)) of each source's stream.
        """
        # Whole blocks take `_per_block` each; the last block is counted up to the position.
        block, place = divmod(position, self.block)
        mixed, _ = self._tables((block,))
        return block * self._per_block + np.bincount(mixed[0, :place], minlength=len(self.weights))

    def _mix_blocks(self, blocks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place, and how many earlier places of the block have the same one; both [blocks, block]."""
        keys = hash_keys(self.seed, _MIX, np.repeat(np.array(blocks, dtype=np.int64), self.block))
        slots = permute(np.tile(np.arange(self.block), len(blocks)), self.block, keys, bits_for(self.block))
        mixed = self._sorted_sources[slots].reshape(len(blocks), self.block)

        # A stable sort lists the places of source 0 in order, then those of source 1: the same layout as _sorted_ranks.
        places = np.argsort(mixed, axis=1, kind="stable")
        ranks = np.empty_like(places)
        np.put_along_axis(ranks, places, np.broadcast_to(self._sorted_ranks, places.shape), axis=1)
        return mixed, ranks


class EvenMixture:
    """Sources mixed sample by sample, without a table: the second version of `Mixture`.

    A block has `weights[s]` places of source s. The slot that a place is permuted to also determines which of the
    source's samples in this block it is. So each position costs one permutation, regardless of the number of blocks in
    a batch. The inverse, from a sample to its position, costs the same.
    """

    name = "mixture-v2"

    def __init__(self, weights: Sequence[int], seed: int) -> None:
        self.weights = _divide_by_gcd(list(weights))
        self.seed = seed
        self.block = sum(self.weights)
        self._per_block = np.array(self.weights, dtype=np.int64)  # [sources]
        self._ends = np.cumsum(self._per_block)
        self._bits = bits_for(self.block)

    def describe(self) -> dict[str, Any]:
        """As in `Mixture`."""
        return {"name": self.name, "seed": self.seed, "weights": list(self.weights)}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and position in that source's own stream: int64, in the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        blocks, places = np.divmod(positions.reshape(-1), self.block)
        slots = permute(places, self.block, hash_keys(self.seed, _MIX, blocks), self._bits)
        sources = np.searchsorted(self._ends, slots, side="right")
        per_block = self._per_block[sources]
        inside = blocks * per_block + slots - (self._ends[sources] - per_block)
        return sources.reshape(positions.shape), inside.reshape(positions.shape)

    def positions(self, sources: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """The inverse of `split`: int64 [N] each."""
        per_block = self._per_block[sources]
        blocks, ranks = np.divmod(inside, per_block)
        slots = self._ends[sources] - per_block + ranks
        places = unpermute(slots, self.block, hash_keys(self.seed, _MIX, blocks), self._bits)
        return blocks * self.block + places

    def consumed(self, position: int) -> np.ndarray:
        """Samples of each source in whole blocks before the position: int64 [sources].

        Within the block that contains the position, later samples of a source may have earlier positions.
        """
        return position // self.block * self._per_block


class Buckets:
    """Sources of different shapes: all samples of one global batch come from one bucket, the same on every rank.

    The steps are mixed by `weights`, by default the sizes of the buckets. Each bucket is read in its own order, a whole
    global batch at a time, so position % world_size is the same in the run and in the bucket.
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
            raise ConfigError(f"{len(weights)} weights for {len(sizes)} buckets; give one weight per bucket, or none")
        # The mixture works on steps instead of samples: its positions are the numbers of global batches.
        self._steps = Mixture(sizes if weights is None else weights, seed, total)
        self.global_batch_size = global_batch_size

    def describe(self) -> dict[str, Any]:
        """As in `Mixture`, with the global batch size: it decides which step a position is in."""
        return {**self._steps.describe(), "name": self.name, "global_batch_size": self.global_batch_size}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bucket of each position, and position in that bucket's own stream: int64, in the shape of `positions`."""
        # The samples of a step follow those of the bucket's earlier steps.
        steps, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.global_batch_size)
        buckets, earlier_steps = self._steps.split(steps)
        return buckets, earlier_steps * self.global_batch_size + offsets

    def consumed(self, position: int) -> np.ndarray:
        """Samples of each bucket before the position: int64 [buckets]."""
        # Whole earlier steps, and the first `offset` samples of the step that the position is in.
        step, offset = divmod(position, self.global_batch_size)
        before = self._steps.consumed(step)
        after = self._steps.consumed(step + 1)
        return before * self.global_batch_size + (after - before) * offset


def whole_weights(weights: Sequence[float], total: int) -> list[int]:
    """The smallest whole numbers in the proportion of the weights: 0.7, 0.2, 0.1 become 7, 2, 1.

    Weights are taken as the decimals they are written as, not as binary fractions. If the sum would exceed `total`, the
    result is the nearest whole numbers that sum to `total`, by largest remainder. Raises ConfigError.
    """
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"weight {source} is {weight}; set a weight above 0, or remove the source")
    if not weights:
        raise ConfigError("0 sources to mix; list 1 or more")

    # Fraction(str(0.1)) is 1/10, while Fraction(0.1) would be the binary fraction nearest to it.
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = _divide_by_gcd([int(weight * denominator) for weight in exact])
    return whole if sum(whole) <= total else _divide_by_gcd(largest_remainder(whole, total))


def _divide_by_gcd(numbers: list[int]) -> list[int]:
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def largest_remainder(weights: list[int], total: int) -> list[int]:
    """Whole shares of `total`, in proportion to `weights`. Raises ConfigError if a share is 0."""
    # Round down, then add one to the shares with the largest remainders until the sum is `total`.
    whole = sum(weights)
    shares = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda source: -(weights[source] * total % whole))
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1

    if 0 in shares:
        source = shares.index(0)
        raise ConfigError(
            f"weight {source} is {weights[source] / whole:.2g} of the sum and has 0 places in a block of {total}; "
            f"raise it to 1/{total} of the sum or more, or remove the source"
        )
    return shares
