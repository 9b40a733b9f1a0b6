"""Which tokens a masked model predicts in training, and the path along which each of them flows.

The rules are those of masked autoregression without quantisation (MAR: Li et al., arXiv 2406.11838, and LTH14/mar,
models/mar.py). MAR draws one ratio for a whole batch. Here each sample has its own, so that the loss of a sample does
not depend on the rest of the batch.
"""

from __future__ import annotations

import math

import torch

# The mask ratio is N(1, RATIO_STD^2), truncated to [RATIO_LOWEST, 1].
RATIO_LOWEST = 0.7
RATIO_STD = 0.25


def mask_ratio(u: torch.Tensor) -> torch.Tensor:
    """Shares of tokens to mask, from uniform numbers in (0, 1); float64, shaped like u."""
    # Inverse transform sampling: F^-1(F(lowest) + u (F(1) - F(lowest))), with F(1) = 1/2 since the mean is 1.
    lowest = 0.5 * (1.0 + math.erf((RATIO_LOWEST - 1.0) / RATIO_STD / math.sqrt(2.0)))
    return 1.0 + RATIO_STD * torch.special.ndtri(lowest + u.double() * (0.5 - lowest))


def arccosine_ratio(u: torch.Tensor) -> torch.Tensor:
    """Shares of tokens to mask, 2/pi arccos(u), as in DC-AR, from uniform numbers; shaped like u."""
    return 2.0 / math.pi * torch.arccos(u.double())


def random_order(u: torch.Tensor) -> torch.Tensor:
    """A random permutation of the tokens of each sample, from uniform numbers [B, T]; int64 [B, T]."""
    return u.argsort(dim=1, stable=True)


def random_mask(u: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Bool [B, T], True = masked: the first ceil(ratio T) tokens of each sample's random order. u [B, T], ratio [B]."""
    count = (ratio * u.shape[1]).ceil().long()  # [B]
    # The argsort of a permutation is its inverse: the rank of each token in the order.
    rank = random_order(u).argsort(dim=1)  # [B, T]
    return rank < count[:, None]


def token_points(tokens: torch.Tensor, noise: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(states, targets) [B, R, T, c] of R draws: x_u = (1 - u) n + u z and d = z - n, eq. (1)-(4) for K = 1.

    tokens z [B, T, c]; noise n [B, R, T, c]; u [B, R, T], a time for each token.
    """
    ends = tokens[:, None]  # [B, 1, T, c]
    weight = u[..., None]  # [B, R, T, 1]
    return (1.0 - weight) * noise + weight * ends, ends - noise
