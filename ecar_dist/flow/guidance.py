"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), on all channels, ramped over the stages.

Plain arithmetic. torch is imported only for type annotations, so `ecar-dist plan` can count guided passes without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def guide(conditional: torch.Tensor, null: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """v = v_null + w (v_cond - v_null). Exactly v_cond at w = 1 and v_null at w = 0."""
    # The formula would give these two cases only up to rounding.
    if guidance_scale == 1.0:
        return conditional
    if guidance_scale == 0.0:
        return null
    return null + guidance_scale * (conditional - null)


def is_guided(guidance_scale: float, interval: tuple[float, float], time: float) -> bool:
    """Whether the velocity at this model time is guided: inside `interval`, ends included.

    The limited interval is that of Kynkäänniemi et al., arXiv 2404.07724. w = 1 is the conditional model and w = 0 the
    unconditional one, at all times.
    """
    if guidance_scale in (0.0, 1.0):
        return guidance_scale == 0.0
    return interval[0] <= time <= interval[1]


def stage_guidance_scales(guidance_scale: float, num_stages: int, ramp: str) -> tuple[float, ...]:
    """w_k of every stage. `linear`: w_k = 1 + (w - 1) k / (K - 1), so stage 0 needs no null pass; `constant`: w.

    w = 0 is the unconditional model. It gives 0 in every stage, because the linear ramp would start at the
    conditional model.
    """
    if ramp == "constant" or num_stages == 1 or guidance_scale == 0.0:
        return (guidance_scale,) * num_stages
    # The formula of FlowAR (arXiv 2412.15205).
    return tuple(1.0 + (guidance_scale - 1.0) * k / (num_stages - 1) for k in range(num_stages))
