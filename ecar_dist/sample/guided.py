"""The velocity that a solver calls, from a network that sees each sample once, or twice where it is guided."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ecar_dist.flow.guidance import guide
from ecar_dist.flow.solvers import VelocityFn


def with_null(labels: torch.Tensor, null_label: int) -> torch.Tensor:
    """Labels [B] and as many null labels: [2 B]."""
    return torch.cat((labels, torch.full_like(labels, null_label)))


def guided_velocity(
    plain: VelocityFn, doubled: VelocityFn, guidance_scale: float, guided_at: Callable[[float], bool]
) -> VelocityFn:
    """The velocity at x [B, ...], guided at the times u for which `guided_at` is true.

    plain(x, u, length): the conditional velocity of x [B, ...].
    doubled(x, u, length): the velocities of a doubled batch [2 B, ...], whose second half has the null label.
    """

    def velocity(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        if not guided_at(u):
            return plain(x, u, length)
        conditional, null = doubled(torch.cat((x, x)), u, length).chunk(2)
        return guide(conditional, null, guidance_scale)

    return velocity
