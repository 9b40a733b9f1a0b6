"""Keyed permutations of range(size), looked up value by value: no table, any size, each value under its own key.

A Feistel network over a power of two that holds the range, walked past values outside it (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002). What these functions return is part of every run's order of samples and
of the bytes of every encoded set: another result needs another name of the order.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8  # even, so that the two halves end with the widths they began with
_GOLDEN = 0x9E3779B97F4A7C15  # the step of SplitMix64: 2^64 over the golden ratio, odd


def hash_keys(seed: int, *fields: int | np.ndarray) -> np.ndarray:
    """uint64 keys, hashed from the seed and the fields (integers or int64 arrays that broadcast), one by one.

    The first field of a new use should be a number of its own, far from any seed or counter: with seed 0, field 7 gives
    what seed 7 gives.
    """
    keys = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    for field in fields:
        keys = _mix(keys + np.asarray(field, dtype=np.int64).astype(np.uint64))
    return keys


def bits_for(size: int) -> int:
    """The least network that holds range(size)."""
    return max(1, (size - 1).bit_length())


def permute(values: np.ndarray, sizes: int | np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """Image of each value under the permutation of range(its size) that its key names; int64 [N] in and out.

    values: int64 [N], each in [0, size). sizes: one integer or int64 [N]. keys: uint64 [N], from `hash_keys`. bits: of
    the network, at least `bits_for(size)` for every size. It is part of the permutation, so it must come from what is
    constant in an order, never from the values that happen to be asked for; each bit too many doubles the walk.
    """
    images = values.astype(np.uint64)
    bounds = np.broadcast_to(np.asarray(sizes, dtype=np.uint64), images.shape)
    round_keys = _mix(keys + np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN))  # [rounds, N]
    walking = np.arange(images.size)
    while walking.size:
        moved = _feistel(images[walking], round_keys[:, walking], bits)
        images[walking] = moved
        walking = walking[moved >= bounds[walking]]
    return images.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """One pass over `bits`-bit uint64 values, keys [rounds, N]. The halves may differ by a bit and swap each round."""
    left_bits, right_bits = bits - bits // 2, bits // 2
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(words: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that mixes every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
