"""The samplers of `par` and `par_cont`: group by group, with a cache of keys and values.

Guidance is per step: its scale is constant, or rises with the share of tokens drawn (`sample.guidance_ramp`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch

from ecar_dist.flow.discrete.categorical import draw_codes
from ecar_dist.flow.discrete.region_order import inverse_order
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.flow.unmasking import masked_guidance_scales
from ecar_dist.models.attention import KVCache
from ecar_dist.models.layers import patchify, unpatchify
from ecar_dist.models.tokens.par import PAR, ContinuousPAR, GroupedTransformer, index_on
from ecar_dist.rng import Draw, Purpose, draw_all, normal, uniform
from ecar_dist.sample.guided import branches, guided_head, guided_output, is_doubled
from ecar_dist.sample.masked import keyed_tokens
from ecar_dist.sample.sampling_plan import SamplingPlan


def draw_grouped(
    model: PAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """`par`: the latent, [B, C, h, w], as the one stage. Labels and indices int64 [B].

    A token's random numbers are keyed by the sample's index and the token's number in the order.
    """
    cache = model.trunk.start_cache()
    codes = torch.empty(len(labels), 0, dtype=torch.int64, device=labels.device)  # [B, start]
    for start, stop, scale in _steps(model.trunk, plan):
        logits = guided_output(plan, next_logits(model, plan, codes, labels, start, stop, cache), scale)
        u = code_noise(seed, indices, start, stop, logits.shape[-1])
        drawn = draw_codes(logits, u, temperature=plan.temperature, top_k=plan.top_k)
        codes = torch.cat((codes, drawn), dim=1)
    return [unpatchify(model.tokens_of(codes), model.patch_size)]


def draw_grouped_tokens(
    model: ContinuousPAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """`par_cont`: as `draw_grouped`, but a flow draws each token from its noise, which is keyed by its place."""
    noise = patchify(normal(seed, indices, Purpose.GENERATE_START, plan.shape(0)), model.patch_size)  # [B, N, c]
    noise = noise[:, index_on(model.trunk.order, noise.device)]
    (num_steps,) = plan.steps_per_stage  # of the solver, for each token

    cache = model.trunk.start_cache()
    tokens = noise[:, :0]
    for start, stop, scale in _steps(model.trunk, plan):
        velocity_fn = _velocity_fn(model, plan, tokens, labels, start, stop, cache, scale)
        drawn = SOLVERS[plan.solver](velocity_fn, noise[:, start:stop], num_steps, plan.time_shift)
        tokens = torch.cat((tokens, drawn), dim=1)
    tokens = tokens[:, index_on(inverse_order(model.trunk.order), tokens.device)]
    return [unpatchify(tokens, model.patch_size)]


def _steps(trunk: GroupedTransformer, plan: SamplingPlan) -> Iterator[tuple[int, int, float]]:
    """(first token, end, guidance scale) of each step."""
    ends = [0, *accumulate(trunk.group_sizes)]
    left = tuple(ends[-1] - end for end in ends)
    scales = masked_guidance_scales(plan.guidance_scale, left, plan.guidance_ramp)
    for (start, stop), scale in zip(pairwise(ends), scales, strict=True):
        yield start, stop, scale


def next_logits(
    model: PAR, plan: SamplingPlan, codes: torch.Tensor, labels: torch.Tensor, start: int, stop: int, cache: KVCache
) -> torch.Tensor:
    """The logits of tokens start .. stop - 1 after codes [B, ..], [B or 2 B, stop - start, V], the null half last."""
    shown = torch.cat((codes, codes)) if is_doubled(plan) else codes
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=plan.bf16):
        return model.next_logits(shown, branches(plan, labels), start, stop, cache)


def code_noise(seed: int, indices: torch.Tensor, start: int, stop: int, num_codes: int) -> torch.Tensor:
    """U(0, 1) numbers of tokens start .. stop - 1, float32 [B, stop - start, V]."""
    draws = [Draw(Purpose.GENERATE_CODE, (num_codes,), slot, is_normal=False) for slot in range(start, stop)]
    return torch.stack(draw_all(seed, indices, draws), dim=1)


def _velocity_fn(
    model: ContinuousPAR,
    plan: SamplingPlan,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    stop: int,
    cache: KVCache,
    scale: float,
) -> VelocityFn:
    """The guided velocity of tokens start .. stop - 1, [B, stop - start, c]."""
    # The transformer, once per step.
    shown = torch.cat((tokens, tokens)) if is_doubled(plan) else tokens
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=plan.bf16):
        condition = model.next_conditions(shown, branches(plan, labels), start, stop, cache)

    # The head, at each solver call.
    return guided_head(model, plan, condition, scale)


def code_logits(
    model: PAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The logits of every code at keyed tokens, one of [B, N, V]."""
    tokens = patchify(normal(seed, indices, Purpose.CONTEXT, plan.shape(0)), model.patch_size)
    return [model(tokens, labels)[0]]


def token_velocities(
    model: ContinuousPAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The velocity of every token at keyed tokens, states and times, one of [B, C, h, w]."""
    tokens, states = keyed_tokens(plan, model.patch_size, indices, seed)  # [B, N, c]
    times = model_time(plan.schedule, 0, uniform(seed, indices, Purpose.TIME, (tokens.shape[1],)))  # [B, N]
    velocity = model(tokens, states[:, None], times[:, None], labels)[:, 0]
    return [unpatchify(velocity, model.patch_size)]
