"""The smallest model that can learn the Gaussian field: a velocity linear in the state, its gain a polynomial in u."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.flow.oracle import GaussianOracle

DEGREE = 5


@dataclass(frozen=True)
class LinearVelocity:
    """v = sum_p T_p(2u - 1) x A_p, without contexts."""

    gains: list[torch.Tensor]  # K of [(DEGREE + 1) T_k, T_k] for T_k pixels

    def velocity(self, stage: int, x: torch.Tensor, u: float, contexts: list[torch.Tensor]) -> torch.Tensor:
        times = torch.full((len(x),), u, dtype=x.dtype)
        return (features(x, times) @ self.gains[stage]).reshape(x.shape)


def features(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Pixels of x [B, 1, h, h] times Chebyshev polynomials of u [B]; [B, (DEGREE + 1) h^2]."""
    polynomials = torch.cos(torch.arange(DEGREE + 1) * torch.arccos(2 * u[:, None] - 1))  # [B, P]
    return torch.einsum("bp,bt->bpt", polynomials, x.flatten(1)).flatten(1)


def fit_linear_velocity(data: GaussianOracle, num_samples: int, seed: int) -> LinearVelocity:
    """Least squares on production training points, each with its own u."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(num_samples, data.num_sources, dtype=torch.float64, generator=generator)
    u = torch.rand(num_samples, data.schedule.num_stages, dtype=torch.float64, generator=generator)
    points = data.points(white @ data.source_root, u)
    gains = []
    for states, times, targets in zip(points.states, u.unbind(1), points.targets, strict=True):
        seen = features(states, times)
        gains.append(torch.linalg.solve(seen.T @ seen, seen.T @ targets.flatten(1)))
    return LinearVelocity(gains)
