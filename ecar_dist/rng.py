"""Random numbers that are a pure function of (seed, position, purpose, stream, element).

Every sample of the run has a position: 0, 1, 2, ... The numbers drawn for it do not depend on rank, micro-batch or
history. So a checkpoint contains no generator state, and any number of ranks sees the same noise.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
int64 tensor operations, which give the same words on every device. Its key is the seed, its counter is (block of
elements, position low, position high, purpose and stream).
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_MASK32 = 0xFFFFFFFF

# The constants of the paper.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """The purpose of a draw. Its number determines the random numbers of a run: never reuse or renumber one."""

    POSTERIOR = 1  # the sample of the autoencoder's posterior
    NOISE = 2  # the noise field of each stage
    TIME = 3  # u, the time inside each stage
    CONTEXT = 4  # noise on the state fed back to the AR transformer
    LABEL_DROP = 5  # which labels are dropped, for classifier-free guidance
    FLIP = 6  # horizontal flips
    MASK_RATIO = 7  # the share of a sample's tokens that is masked
    MASK_ORDER = 8  # which tokens those are
    INTERVAL = 9  # the interval of an average velocity, and where it is split
    GENERATE_START = 16  # sampling: the coarsest stage's noise
    GENERATE_JUMP = 17  # sampling: renoising at a stage jump
    GENERATE_CONTEXT = 18  # sampling: noise on the fed-back state
    GENERATE_ORDER = 19  # sampling: the order in which tokens are drawn
    GENERATE_CODE = 20  # sampling: which code a token gets
    CODEBOOK = 21  # fitting a codebook: the first codes, and those that replace dead ones


def philox4x32(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Four 32-bit words (int64 tensors in [0, 2^32)) for each counter of four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # One round: two 32 x 32 bit products, mixed with the other words and the round key.
        high0, low0 = _multiply_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def _multiply_high_low(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two 32-bit halves of a 32 x 32 bit product, without leaving int64's range."""
    by_low = word * (multiplier & 0xFFFF)
    by_high = word * (multiplier >> 16) + (by_low >> 16)
    return by_high >> 16, ((by_high & 0xFFFF) << 16) | (by_low & 0xFFFF)


class Draw(NamedTuple):
    """What is drawn for each position: numbers of N(0, 1), or of U(0, 1), which are never 0 and never 1.

    `stream` separates several draws of one purpose, e.g. one per stage.
    """

    purpose: Purpose
    shape: tuple[int, ...] = ()
    stream: int = 0
    is_normal: bool = True


def draw_all(seed: int, positions: torch.Tensor, draws: Sequence[Draw]) -> list[torch.Tensor]:
    """The numbers of all draws, in their order: float32 [B, *shape] each, on the device of `positions` (int64 [B]).

    One pass of the generator makes all of them, because its cost on a GPU is that of launching its many small kernels.
    Each draw gets the numbers that it would get alone.
    """
    # First all normal draws, then the uniform ones.
    ordered = sorted(draws, key=lambda draw: not draw.is_normal)
    unit = _to_unit(_words(seed, positions, tuple(ordered)))  # [B, 4 N]
    normals = 4 * sum(_blocks(draw) for draw in draws if draw.is_normal)
    numbers = torch.cat((_box_muller(unit[:, :normals]), unit[:, normals:]), dim=1) if normals else unit

    # Split them. The last block of a draw may contain more numbers than it needs.
    found = {}
    start = 0
    for draw in ordered:
        flat = numbers[:, start : start + math.prod(draw.shape)]
        found[draw] = flat.reshape(-1, *draw.shape).contiguous()  # compiled code has one graph for each layout
        start += 4 * _blocks(draw)
    return [found[draw] for draw in draws]


def uniform(
    seed: int, positions: torch.Tensor, purpose: Purpose, shape: tuple[int, ...] = (), *, stream: int = 0
) -> torch.Tensor:
    """U(0, 1) numbers of one draw, float32 [B, *shape]; see `Draw`."""
    return draw_all(seed, positions, [Draw(purpose, shape, stream, is_normal=False)])[0]


def normal(
    seed: int, positions: torch.Tensor, purpose: Purpose, shape: tuple[int, ...], *, stream: int = 0
) -> torch.Tensor:
    """N(0, 1) numbers of one draw, float32 [B, *shape]; see `Draw`."""
    return draw_all(seed, positions, [Draw(purpose, shape, stream)])[0]


def _blocks(draw: Draw) -> int:
    """The number of counters that a draw needs for each position. Each counter gives four words."""
    return -(-math.prod(draw.shape) // 4)


def _words(seed: int, positions: torch.Tensor, draws: tuple[Draw, ...]) -> torch.Tensor:
    """The words of all draws for each position, side by side: [B, 4 N], int64 in [0, 2^32); N is the sum of blocks."""
    # Counters: half of each depends on the draw, half on the position.
    block, purpose = _draw_counters(draws, positions.device)  # each [1, N]
    positions = positions.to(torch.int64)[:, None]  # [B, 1]
    low = positions & _MASK32
    high = (positions >> 32) & _MASK32

    words = philox4x32([block, low, high, purpose], (seed & _MASK32, (seed >> 32) & _MASK32))
    return torch.stack(words, dim=-1).flatten(1)  # [B, 4 N]


@functools.lru_cache(maxsize=64)
def _draw_counters(draws: tuple[Draw, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each block within its draw, and the purpose and stream of the draw: int64 [1, N] each."""
    with torch.inference_mode(False):  # counters first made while sampling must work in training too
        # Created on the device: the host would have to wait for a copy.
        blocks = [torch.arange(_blocks(draw), device=device) for draw in draws]
        purposes = [
            torch.full((_blocks(draw),), int(draw.purpose) | draw.stream << 16, device=device) for draw in draws
        ]
        return torch.cat(blocks)[None], torch.cat(purposes)[None]


def _to_unit(words: torch.Tensor) -> torch.Tensor:
    """The upper 23 bits as the middle of one of 2^23 equal cells of (0, 1): exact in float32."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _box_muller(unit: torch.Tensor) -> torch.Tensor:
    """U(0, 1) numbers [B, 2 n] -> as many of N(0, 1): two uniform numbers give two normal ones."""
    # Radius and angle of a point of the plane.
    pairs = unit.unflatten(1, (-1, 2))  # [B, n, 2]
    radius = torch.sqrt(-2.0 * torch.log(pairs[..., 0]))
    angle = (2.0 * math.pi) * pairs[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)
