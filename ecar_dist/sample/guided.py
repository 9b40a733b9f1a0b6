"""The velocity that a solver calls, from a network that sees each sample once, or twice where it is guided."""

from __future__ import annotations

import torch

from ecar_dist.flow.guidance import guide
from ecar_dist.flow.solvers import VelocityFn


def with_null(labels: torch.Tensor, null_label: int) -> torch.Tensor:
    """Labels [B] and as many null labels: [2 B]."""
    return torch.cat((labels, torch.full_like(labels, null_label)))


def guided_velocity(network: VelocityFn, guidance_scale: float) -> VelocityFn:
    """The guided velocity at x [B, ...].

    network(x, u): the velocity of x [B, ...] if the scale is 1, which needs no null pass. Otherwise the velocities of a
    doubled batch [2 B, ...], whose second half has the null label.
    """
    if guidance_scale == 1.0:
        return network

    def velocity(x: torch.Tensor, u: float) -> torch.Tensor:
        conditional, null = network(torch.cat((x, x)), u).chunk(2)
        return guide(conditional, null, guidance_scale)

    return velocity
