"""The sampler of `mar`: tokens in random order, several in each step, each by a flow conditioned on the trunk.

Orders, counts and guidance are those of MAR (Li et al., arXiv 2406.11838, and LTH14/mar, models/mar.py).
"""

from __future__ import annotations

import itertools

import torch

from ecar_dist.flow.masking import mask_ratio, random_mask, random_order
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.flow.unmasking import masked_counts, masked_guidance_scales
from ecar_dist.models.layers import patchify, unpatchify
from ecar_dist.models.mar import MAR
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.sample.guided import guided_velocity, head_velocity, with_null
from ecar_dist.sample.sampling_plan import SamplingPlan


def draw_masked(
    model: MAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The latent, [B, C, h, w], as the one stage. Labels and indices int64 [B].

    A token's noise and its place in the order are keyed by the sample's index, whichever step draws it.
    """
    # What is drawn in which step, and with which guidance.
    noise = patchify(normal(seed, indices, Purpose.GENERATE_START, plan.shape(0)), model.patch_size)  # [B, T, c]
    order = random_order(uniform(seed, indices, Purpose.GENERATE_ORDER, (noise.shape[1],)))  # [B, T]
    counts = masked_counts(noise.shape[1], plan.ar_steps)
    scales = masked_guidance_scales(plan.guidance_scale, counts, plan.guidance_ramp)
    (num_steps,) = plan.steps_per_stage  # of the solver, for each token

    # All tokens are masked at first.
    tokens = torch.zeros_like(noise)
    mask = torch.ones_like(order, dtype=torch.bool)
    for (before, after), scale in zip(itertools.pairwise(counts), scales, strict=True):
        # The tokens of this step: the order is used up from its end.
        chosen = order[:, after:before]  # [B, n]

        # Draw them from noise by the flow, conditioned on the tokens drawn so far.
        velocity_fn = _velocity_fn(model, plan, tokens, mask, chosen, labels, scale)
        drawn = SOLVERS[plan.solver](velocity_fn, _take(noise, chosen), num_steps, plan.time_shift)  # [B, n, c]

        # Put them in their places.
        tokens = tokens.scatter(1, _places(chosen, tokens), drawn)
        mask = mask.scatter(1, chosen, False)
    return [unpatchify(tokens, model.patch_size)]


def _velocity_fn(
    model: MAR,
    plan: SamplingPlan,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    chosen: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
) -> VelocityFn:
    """The guided velocity of the chosen tokens [B, n, c]; without a null pass if the scale is 1."""
    if scale != 1.0:
        tokens, mask, chosen = (torch.cat((x, x)) for x in (tokens, mask, chosen))
        labels = with_null(labels, plan.null_label)

    # The trunk, once per step.
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=plan.bf16):
        condition = _take(model.conditions(tokens, mask, labels), chosen)  # [B or 2 B, n, D]

    # The head, at each solver call.
    network = head_velocity(model, plan, condition)
    return guided_velocity(network, network, scale, plan.guided_at(0, scale))


def _places(chosen: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Token places [B, n] as an index into values [B, T, D]: [B, n, D]."""
    return chosen[..., None].expand(-1, -1, values.shape[-1])


def _take(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, T, D] at places [B, n] -> [B, n, D]."""
    return values.gather(1, _places(chosen, values))


def keyed_tokens(
    plan: SamplingPlan, patch_size: int, indices: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that stands in for clean tokens and for states, each [B, T, c], where networks are compared."""
    clean, states = (normal(seed, indices, purpose, plan.shape(0)) for purpose in (Purpose.CONTEXT, Purpose.NOISE))
    return patchify(clean, patch_size), patchify(states, patch_size)


def token_velocities(
    model: MAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The velocity of every token at keyed tokens, mask, states and times: one of [B, C, h, w]."""
    tokens, states = keyed_tokens(plan, model.patch_size, indices, seed)  # [B, T, c]
    shape = (tokens.shape[1],)
    ratio = mask_ratio(uniform(seed, indices, Purpose.MASK_RATIO))
    mask = random_mask(uniform(seed, indices, Purpose.MASK_ORDER, shape), ratio)  # [B, T]
    times = model_time(plan.schedule, 0, uniform(seed, indices, Purpose.TIME, shape))  # [B, T]

    velocity = model(tokens, mask, states[:, None], times[:, None], labels)[:, 0]  # [B, T, c]
    return [unpatchify(velocity, model.patch_size)]
