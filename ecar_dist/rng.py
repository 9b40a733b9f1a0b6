"""Random numbers that are a pure function of (seed, position, purpose, stream, element).

Every sample of the run has a position: 0, 1, 2, ... What is drawn for it does not depend on rank, micro-batch or
history. So a checkpoint holds no generator state, and any number of ranks sees the same noise.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
int64 tensor operations, which give the same words on every device. Its key is the seed, its counter is (block of
elements, position low, position high, purpose and stream).
"""

from __future__ import annotations

import enum
import math

import torch

_MASK32 = 0xFFFFFFFF

# The constants of the paper.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What a draw is for. The numbers decide what a run draws: never reuse or renumber one."""

    POSTERIOR = 1  # the sample of the autoencoder's posterior
    NOISE = 2  # the noise field of each stage
    TIME = 3  # u, the time inside each stage
    CONTEXT = 4  # noise on the state fed back to the AR transformer
    LABEL_DROP = 5  # which labels are dropped, for classifier-free guidance
    FLIP = 6  # horizontal flips
    MASK_RATIO = 7  # the share of a sample's tokens that is masked
    MASK_ORDER = 8  # which tokens those are
    GENERATE_START = 16  # sampling: the coarsest stage's noise
    GENERATE_JUMP = 17  # sampling: renoising at a stage jump
    GENERATE_CONTEXT = 18  # sampling: noise on the fed-back state
    GENERATE_ORDER = 19  # sampling: the order in which tokens are drawn


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


def _words(seed: int, positions: torch.Tensor, purpose: Purpose, stream: int, count: int) -> torch.Tensor:
    """`count` words for each position: [B, count], int64 in [0, 2^32)."""
    # Counters: four words come from each block of elements.
    blocks = -(-count // 4)
    positions = positions.to(torch.int64)[:, None]  # [B, 1]
    block = torch.arange(blocks, device=positions.device, dtype=torch.int64)[None, :]  # [1, N]
    c0 = block.expand(positions.shape[0], blocks)
    c1 = (positions & _MASK32).expand_as(c0)
    c2 = ((positions >> 32) & _MASK32).expand_as(c0)
    c3 = torch.full_like(c0, int(purpose) | stream << 16)

    # The last block may hold more words than are needed.
    words = philox4x32([c0, c1, c2, c3], (seed & _MASK32, (seed >> 32) & _MASK32))
    return torch.stack(words, dim=-1).reshape(positions.shape[0], -1)[:, :count]  # [B, count]


def uniform(
    seed: int, positions: torch.Tensor, purpose: Purpose, shape: tuple[int, ...] = (), *, stream: int = 0
) -> torch.Tensor:
    """U(0, 1) numbers, float32 [B, *shape], on the device of `positions` (int64 [B]). Never 0, never 1.

    `stream` separates several draws of one purpose, e.g. one per stage.
    """
    words = _words(seed, positions, purpose, stream, math.prod(shape))
    return _to_unit(words).reshape(positions.shape[0], *shape)


def normal(
    seed: int, positions: torch.Tensor, purpose: Purpose, shape: tuple[int, ...], *, stream: int = 0
) -> torch.Tensor:
    """N(0, 1) numbers by Box-Muller, float32 [B, *shape], on the device of `positions` (int64 [B])."""
    # Two uniform numbers give two normal ones.
    count = math.prod(shape)
    pairs = -(-count // 2)
    unit = _to_unit(_words(seed, positions, purpose, stream, 2 * pairs)).reshape(-1, pairs, 2)

    # Box-Muller: radius and angle of a point of the plane.
    radius = torch.sqrt(-2.0 * torch.log(unit[..., 0]))
    angle = (2.0 * math.pi) * unit[..., 1]
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # [B, pairs, 2]
    return both.reshape(positions.shape[0], -1)[:, :count].reshape(positions.shape[0], *shape)


def _to_unit(words: torch.Tensor) -> torch.Tensor:
    """The upper 23 bits as the middle of one of 2^23 equal cells of (0, 1): exact in float32."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
