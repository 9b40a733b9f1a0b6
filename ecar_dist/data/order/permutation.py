"""Keyed permutations of range(size), computed value by value: no table, any size, a key for each value.

A Feistel network permutes range(2^bits) for the least power of two that covers the range. A value that lands outside
the range is permuted again until it lands inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002).

The results determine the sample order of every run and the bytes of every encoded set. A change to them needs a new
name for the order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# An even number of rounds, so that the two halves end with their original widths.
_ROUNDS = 8

_PIECE = 1 << 16  # values

# The increment of SplitMix64: 2^64 divided by the golden ratio, odd.
_GOLDEN = 0x9E3779B97F4A7C15


def hash_keys(seed: int, *fields: int | np.ndarray) -> np.ndarray:
    """uint64 keys, hashed from the seed and then from each field (integers or int64 arrays that broadcast).

    The first field of each new use should be its own constant, far from any seed or counter: seed 0 with field 7 gives
    the same key as seed 7 without fields.
    """
    # Each field is added and mixed in turn, so the order of the fields matters. uint64 arithmetic wraps around.
    keys = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    for field in fields:
        keys = _mix(keys + np.asarray(field, dtype=np.int64).astype(np.uint64))
    return keys


def bits_for(size: int) -> int:
    """Width of the smallest network that covers range(size)."""
    return max(1, (size - 1).bit_length())


def permute(values: np.ndarray, sizes: int | np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """Image of each value under the permutation of range(size) that its key selects; int64 [N] in and out.

    values: int64 [N], each in [0, size). sizes: one integer or int64 [N]. keys: uint64 [N], from `hash_keys`.
    bits: width of the network, at least `bits_for(size)` for every size. The permutation depends on it, so it must
    follow from constants of an order, never from the values in one call. Each extra bit doubles the expected number of
    passes.
    """
    return _in_pieces(_feistel, values, sizes, keys, bits)


def unpermute(images: np.ndarray, sizes: int | np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """The values that `permute` maps to these images; int64 [N] in and out. Same arguments as `permute`."""
    return _in_pieces(_feistel_back, images, sizes, keys, bits)


def _in_pieces(
    network: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    values: np.ndarray,
    sizes: int | np.ndarray,
    keys: np.ndarray,
    bits: int,
) -> np.ndarray:
    """Run `_walk` on a bounded number of values at a time: it needs about 150 bytes for each."""
    if len(values) <= _PIECE:
        return _walk(network, values, sizes, keys, bits)
    bounds = np.broadcast_to(np.asarray(sizes, dtype=np.int64), values.shape)
    keys = np.broadcast_to(keys, values.shape)
    images = np.empty_like(values)
    for first in range(0, len(values), _PIECE):
        piece = slice(first, first + _PIECE)
        images[piece] = _walk(network, values[piece], bounds[piece], keys[piece], bits)
    return images


def _walk(
    network: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    values: np.ndarray,
    sizes: int | np.ndarray,
    keys: np.ndarray,
    bits: int,
) -> np.ndarray:
    # Every value has its own key, so each round has one key per value.
    bounds = np.broadcast_to(np.asarray(sizes, dtype=np.uint64), values.shape)
    round_keys = keys + np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)  # [rounds, N]
    scratch = np.empty_like(keys)
    for key in round_keys:
        _mix(key, scratch)
    images = network(values.astype(np.uint64), round_keys, bits)

    # Cycle walking: only the values that are still outside their range go through the network again.
    outside = np.flatnonzero(images >= bounds)
    while outside.size:
        moved = network(images[outside], round_keys[:, outside], bits)
        images[outside] = moved
        outside = outside[moved >= bounds[outside]]
    return images.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """One pass over uint64 values of `bits` bits; keys [rounds, N].

    For an odd number of bits the halves differ by one bit, so their widths swap with them in each round.
    """
    left_bits = bits - bits // 2
    right_bits = bits // 2
    left = values >> np.uint64(right_bits)
    right = values & _mask(right_bits)

    # A round is (left, right) -> (right, left ^ F(right)). It is a bijection for any F. All rounds use the same memory:
    # with new arrays for each step, page faults took longer than the arithmetic.
    image = np.empty_like(right)
    scratch = np.empty_like(right)
    for key in keys:
        np.add(right, key, out=image)
        _mix(image, scratch)
        image &= _mask(left_bits)
        left ^= image
        left, right = right, left
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _feistel_back(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_feistel`."""
    left_bits = bits - bits // 2
    right_bits = bits // 2
    left = values >> np.uint64(right_bits)
    right = values & _mask(right_bits)

    # A round backwards is (left, right) -> (right ^ F(left), left).
    for key in keys[::-1]:
        left, right = right ^ (_mix(left + key) & _mask(right_bits)), left
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(words: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that mixes every bit.

    In place. `scratch` is memory of the same shape.
    """
    shifted = np.right_shift(words, np.uint64(30), out=scratch)
    words ^= shifted
    words *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(words, np.uint64(27), out=shifted)
    words ^= shifted
    words *= np.uint64(0x94D049BB133111EB)
    np.right_shift(words, np.uint64(31), out=shifted)
    words ^= shifted
    return words


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
