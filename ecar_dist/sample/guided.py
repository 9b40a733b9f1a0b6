"""The velocity that a solver calls, from a network that sees each sample once, or twice if it is guided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ecar_dist.flow.guidance import guide
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import VelocityFn
from ecar_dist.sample.sampling_plan import SamplingPlan


def with_null(labels: torch.Tensor, null_label: int) -> torch.Tensor:
    """Labels [B] and as many null labels: [2 B]."""
    return torch.cat((labels, torch.full_like(labels, null_label)))


def guided_velocity(
    plain: VelocityFn,
    doubled: VelocityFn,
    guidance_scale: float,
    guided_at: Callable[[float], bool],
    see: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> VelocityFn:
    """The velocity at x [B, ...], guided at the times u for which `guided_at` is true.

    plain(x, u, length): the conditional velocity of x [B, ...].
    doubled(x, u, length): the velocities of a doubled batch [2 B, ...], whose second half has the null label.
    see: called with the conditional and the null velocity wherever both are evaluated.
    """

    def velocity(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        if not guided_at(u):
            return plain(x, u, length)
        conditional, null = doubled(torch.cat((x, x)), u, length).chunk(2)
        if see is not None:
            see(conditional, null)
        return guide(conditional, null, guidance_scale)

    return velocity


def is_doubled(plan: SamplingPlan) -> bool:
    """Whether the null model runs with the conditional one. If so, it does in every step, since its cache needs all."""
    return plan.guidance_scale not in (0.0, 1.0)


def branches(plan: SamplingPlan, labels: torch.Tensor) -> torch.Tensor:
    """The labels for the network: those of the conditional or the null model (w = 0), [B], or both, [2 B]."""
    if is_doubled(plan):
        return with_null(labels, plan.null_label)
    return torch.full_like(labels, plan.null_label) if plan.guidance_scale == 0.0 else labels


def guided_output(plan: SamplingPlan, output: torch.Tensor, scale: float) -> torch.Tensor:
    """The output of a network run on `branches`, [B or 2 B, ...], after guidance: [B, ...]."""
    if not is_doubled(plan):
        return output
    conditional, null = output.chunk(2)
    return guide(conditional, null, scale)


def head_velocity(model: Any, plan: SamplingPlan, condition: torch.Tensor) -> VelocityFn:
    """The velocity of a flow head for tokens under `condition`, which covers the batch, or the batch and its null half.

    The head learns no average velocities, so the length is ignored.
    """

    def velocity(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        time = model_time(plan.schedule, 0, torch.full((1, 1), u, device=x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.bf16):
            return model.velocity(x, time, condition[: x.shape[0]])

    return velocity


def guided_head(model: Any, plan: SamplingPlan, condition: torch.Tensor, scale: float) -> VelocityFn:
    """`head_velocity` under conditions of `branches`, guided if both halves are present."""
    velocity = head_velocity(model, plan, condition)
    return guided_velocity(velocity, velocity, scale, plan.guided_at(0, scale)) if is_doubled(plan) else velocity
