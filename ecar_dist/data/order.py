"""The order of samples: a pure function of (seed, position), the same for every number of ranks.

Position t = 0, 1, 2, ... runs over the whole run; epoch = t // count. In an epoch the samples follow a keyed Feistel
permutation of range(count), walked past values outside the range (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). So nothing is stored, and any position can be looked up on its own.
"""

from __future__ import annotations

import numpy as np

ORDER_NAME = "feistel-v1"
_ROUNDS = 8  # even, so that the two halves end with the widths they began with


def sample_indices(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sample index in [0, count) for each position, int64 in and out. Positions may straddle epochs."""
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    positions = np.asarray(positions, dtype=np.int64)
    epochs, which = np.unique(positions // count, return_inverse=True)
    keys = _round_keys(seed, epochs)[:, which.reshape(-1)]  # [rounds, N]
    values = (positions % count).reshape(-1).astype(np.uint64)
    bits = max(1, int(count - 1).bit_length())
    walking = np.arange(values.size)
    while walking.size:
        moved = _feistel(values[walking], keys[:, walking], bits)
        values[walking] = moved
        walking = walking[moved >= np.uint64(count)]
    return values.astype(np.int64).reshape(positions.shape)


def rank_positions(step_start: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of one rank inside the global batch that begins at `step_start`: every world_size-th, int64."""
    return np.arange(step_start + rank, step_start + global_batch_size, world_size, dtype=np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """One pass over `bits`-bit uint64 values, keys [rounds, N]. The halves may differ by a bit and swap each round."""
    left_bits, right_bits = bits - bits // 2, bits // 2
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _round_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """uint64 [rounds, E]: hashed from seed, epoch and round one after the other."""
    base = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    of_epoch = _mix(base + epochs.astype(np.uint64))
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(of_epoch[None, :] + rounds[:, None])


def _mix(words: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that mixes every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
