"""The sampler of `hybrid`: codes by masked prediction, the most confident first, then the residuals of all tokens.

Schedule, temperatures and order are those of DC-AR (arXiv 2507.04947): at step k of K the codes are drawn at
temperature 0.5 + 0.8 (1 - k/K), and codes are kept by log-probability plus Gumbel noise of scale 1.5 (1 - k/K). The
residuals are drawn once, from the trunk's output of the last step, in which the last codes were still masked.
"""

from __future__ import annotations

import torch

from ecar_dist.flow.discrete.categorical import draw_codes
from ecar_dist.flow.masking import arccosine_ratio, random_mask
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.flow.unmasking import arccosine, masked_counts, masked_guidance_scales
from ecar_dist.models.layers import patchify, unpatchify
from ecar_dist.models.tokens.hybrid import Hybrid
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.sample.guided import branches, guided_head, guided_output, is_doubled
from ecar_dist.sample.masked import keyed_tokens
from ecar_dist.sample.sampling_plan import SamplingPlan

LOWEST_TEMPERATURE = 0.5
ADDED_TEMPERATURE = 0.8  # at the first step
CONFIDENCE_NOISE = 1.5  # at the first step


def draw_hybrid(
    model: Hybrid, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The latent, [B, C, h, w], as the one stage. Labels and indices int64 [B]."""
    noise = patchify(normal(seed, indices, Purpose.GENERATE_START, plan.shape(0)), model.patch_size)  # [B, T, c]
    counts = masked_counts(noise.shape[1], plan.code_steps, arccosine)
    scales = masked_guidance_scales(plan.guidance_scale, counts, plan.guidance_ramp)
    codes = torch.zeros(noise.shape[:2], dtype=torch.int64, device=noise.device)
    mask = torch.ones_like(codes, dtype=torch.bool)

    # The codes, in one pass of the trunk per step.
    for step, (after, scale) in enumerate(zip(counts[1:], scales, strict=True)):
        hidden = _hidden(model, plan, codes, mask, labels)
        left = 1.0 - (step + 1) / len(scales)
        logits = _guided_logits(model, plan, hidden, scale)
        u = uniform(seed, indices, Purpose.GENERATE_CODE, tuple(logits.shape[1:]), stream=step)
        drawn = draw_codes(logits, u, temperature=plan.temperature * (LOWEST_TEMPERATURE + ADDED_TEMPERATURE * left))

        # The most confident of the masked tokens are kept; the others stay masked.
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        place_u = uniform(seed, indices, Purpose.GENERATE_ORDER, tuple(mask.shape[1:]), stream=step)
        confidence = confidence - CONFIDENCE_NOISE * left * torch.log(-torch.log(place_u))
        codes, mask = reveal(codes, mask, drawn, confidence, after)

    # The residuals, all at once.
    tokens = model.codebook(codes)
    if plan.residuals:
        velocity_fn = _velocity_fn(model, plan, hidden, codes, plan.guidance_scale)
        (num_steps,) = plan.steps_per_stage
        tokens = model.join(tokens, SOLVERS[plan.solver](velocity_fn, noise, num_steps, plan.time_shift))
    return [unpatchify(tokens, model.patch_size)]


def reveal(
    codes: torch.Tensor, mask: torch.Tensor, drawn: torch.Tensor, confidence: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, mask) [B, T] after all but the `left` least confident masked tokens have taken their drawn codes."""
    rank = confidence.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    still = mask & (rank < left)
    return torch.where(mask & ~still, drawn, codes), still


def _hidden(
    model: Hybrid, plan: SamplingPlan, codes: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The trunk's output [B, T, D], or with its null half [2 B, T, D]."""
    if is_doubled(plan):
        codes, mask = torch.cat((codes, codes)), torch.cat((mask, mask))
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=plan.bf16):
        return model.hidden(codes, mask, branches(plan, labels))


def _guided_logits(model: Hybrid, plan: SamplingPlan, hidden: torch.Tensor, scale: float) -> torch.Tensor:
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=plan.bf16):
        logits = model.logits(hidden)
    return guided_output(plan, logits, scale)


def _velocity_fn(
    model: Hybrid, plan: SamplingPlan, hidden: torch.Tensor, codes: torch.Tensor, scale: float
) -> VelocityFn:
    """The guided velocity of all residuals, [B, T, c]."""
    shown = torch.cat((codes, codes)) if is_doubled(plan) else codes
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=plan.bf16):
        condition = model.conditions(hidden, model.codebook(shown))

    return guided_head(model, plan, condition, scale)


def hybrid_outputs(
    model: Hybrid, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The logits and the velocities at keyed tokens, mask, noise and times, side by side: [B, T, V + c]."""
    tokens, noise = keyed_tokens(plan, model.patch_size, indices, seed)  # [B, T, c]
    shape = (tokens.shape[1],)
    ratio = arccosine_ratio(uniform(seed, indices, Purpose.MASK_RATIO))
    mask = random_mask(uniform(seed, indices, Purpose.MASK_ORDER, shape), ratio)  # [B, T]
    u = uniform(seed, indices, Purpose.TIME, shape)[:, None]  # [B, 1, T]
    logits, _, velocities, _ = model(tokens, mask, noise[:, None], u, model_time(plan.schedule, 0, u), labels)
    return [torch.cat((logits, velocities[:, 0]), dim=-1)]
