"""Which tokens a masked model must predict in training, and the path that each of them flows along.

The facts are those of masked autoregression without quantisation (MAR: Li et al., arXiv 2406.11838, and LTH14/mar,
models/mar.py). There one ratio holds for a whole batch; here each sample has its own, so that a sample's loss does not
depend on the batch around it.
"""

from __future__ import annotations

import math

import torch

RATIO_LOWEST = 0.7
RATIO_STD = 0.25  # of the normal whose part in [RATIO_LOWEST, 1] the ratios have; its mean is 1


def mask_ratio(u: torch.Tensor) -> torch.Tensor:
    """Shares of tokens to mask from uniform numbers in (0, 1): the truncated normal's inverse. float64, as u."""
    lowest = 0.5 * (1.0 + math.erf((RATIO_LOWEST - 1.0) / RATIO_STD / math.sqrt(2.0)))  # of the normal below it
    return 1.0 + RATIO_STD * torch.special.ndtri(lowest + u.double() * (0.5 - lowest))


def random_order(u: torch.Tensor) -> torch.Tensor:
    """A permutation of each row's places from uniform numbers [B, T]; int64 [B, T]."""
    return u.argsort(dim=1, stable=True)


def random_mask(u: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Bool [B, T], True = masked: the first ceil(ratio T) tokens of each row's random order. u [B, T], ratio [B]."""
    count = (ratio * u.shape[1]).ceil().long()  # [B]
    rank = random_order(u).argsort(dim=1)  # [B, T]: the place of each token in the order
    return rank < count[:, None]


def token_points(tokens: torch.Tensor, noise: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(states, targets) [B, R, T, c] of R draws: x_u = (1 - u) n + u z and d = z - n, eq. (1)-(4) for K = 1.

    tokens z [B, T, c]; noise [B, R, T, c]; u [B, R, T], a time for each token.
    """
    ends, weight = tokens[:, None], u[..., None]
    return (1.0 - weight) * noise + weight * ends, ends - noise
