"""The sampler of the kinds with a velocity in each stage: their network, run by flow/multistage.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.models.staged import MeanVelocityModel, StagedModel
from ecar_dist.models.token_merger import TokenMerger
from ecar_dist.rng import Draw, Purpose, draw_all
from ecar_dist.sample.guided import guided_velocity, with_null
from ecar_dist.sample.sampling_plan import SamplingPlan

# Calls times images for which modulations are kept, at most: 0.4 GB in bf16 at preset XL.
MOST_MODULATIONS = 1024


def draw_stages(
    model: StagedModel,
    plan: SamplingPlan,
    labels: torch.Tensor,
    indices: torch.Tensor,
    seed: int,
    given: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """X^e_k of every stage, [B, C, h_k, w_k]; section 8 of docs/ecar.md. Labels and indices int64 [B].

    given: X^e_k of the first stages, which are then not drawn.
    """
    batch = labels.shape[0]
    schedule = plan.schedule
    scales = stage_guidance_scales(plan.guidance_scale, schedule.num_stages, plan.guidance_ramp)
    guided = any(scale != 1.0 for scale in scales)
    all_labels = with_null(labels, plan.null_label) if guided else labels  # [B or 2 B]
    cache = model.start_cache()

    # All noise of the batch in one pass: at the start, at the jumps, and on the states that are fed back.
    later = range(1, schedule.num_stages)
    uses = [(Purpose.GENERATE_START, 0), *((Purpose.GENERATE_JUMP, stage) for stage in later)]
    uses += [(Purpose.GENERATE_CONTEXT, stage - 1) for stage in later if plan.tau]
    draws = [Draw(purpose, plan.shape(stage), stage) for purpose, stage in uses]
    noise = dict(zip(uses, draw_all(seed, indices, draws), strict=True))

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        # The token maps, once per stage. The null half is made even if the flow does not need it, because the null
        # blocks of later stages attend to it. Both halves are fed the same states.
        if context is not None and guided:
            context = torch.cat((context, context))
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=plan.bf16):
            condition = model.begin_stage(stage, context, all_labels, cache)

        # The flow, many times per stage. Calls that are not guided need only the conditional half.
        half = None if condition is None else condition[:batch]
        guided_at = plan.guided_at(stage, scales[stage])
        table = _modulations(model, plan, stage, labels, all_labels, guided_at)
        plain = _network(model, plan, stage, half, labels, table)
        doubled = _network(model, plan, stage, condition, all_labels, table)
        if plan.merge_ratio and stage == schedule.num_stages - 1:
            return _merging_velocity(model, plan, plain, doubled, scales[stage], guided_at)
        return guided_velocity(plain, doubled, scales[stage], guided_at)

    return sample_stages(
        schedule,
        begin_stage,
        lambda purpose, stage: noise[purpose, stage],
        tau=plan.tau,
        solver=SOLVERS[plan.solver],
        steps_per_stage=plan.steps_per_stage,
        time_shift=plan.time_shift,
        given=given,
    )


def _merging_velocity(
    model: Any,
    plan: SamplingPlan,
    plain: VelocityFn,
    doubled: VelocityFn,
    scale: float,
    guided_at: Callable[[float], bool],
) -> VelocityFn:
    """The guided velocity with token merging. The first call has no importance yet, and merges nothing."""
    merger = TokenMerger(model.flow.transformer, plan.merge_ratio)
    learn = functools.partial(merger.learn, patch_size=model.flow.patch_size)
    velocity = guided_velocity(plain, doubled, scale, guided_at, learn)

    def merged(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        with merger.active():
            return velocity(x, u, length)

    return merged


def _modulations(
    model: Any,
    plan: SamplingPlan,
    stage: int,
    labels: torch.Tensor,
    all_labels: torch.Tensor,
    guided_at: Callable[[float], bool],
) -> dict[float, torch.Tensor]:
    """What each call of a stage computes from time and labels alone, [B or 2 B, M], by time u; all computed at once.

    Empty if the calls compute it themselves: for a model without `modulations`, for average velocities, which also
    depend on a length, and for a batch so large that the table would be too large.
    """
    solver = SOLVERS[plan.solver]
    times = list(dict.fromkeys(solver.call_times(plan.steps_per_stage[stage], plan.time_shift)))
    too_large = len(times) * len(all_labels) > MOST_MODULATIONS
    if plan.mean_velocity or too_large or not plan.modulates_ahead or not hasattr(model, "modulations"):
        return {}

    # Calls that are not guided need only the conditional half.
    table: dict[float, torch.Tensor] = {}
    for guided, these in ((False, labels), (True, all_labels)):
        some = [u for u in times if guided_at(u) == guided]
        if some:
            # Filled in on the device: a list of numbers would be copied to it from the host.
            at = torch.stack([torch.full((), u, device=labels.device) for u in some])
            at = model_time(plan.schedule, stage, at)
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=plan.bf16):
                table |= dict(zip(some, model.modulations(at, stage, these), strict=True))
    return table


def _network(
    model: StagedModel,
    plan: SamplingPlan,
    stage: int,
    condition: torch.Tensor | None,
    labels: torch.Tensor,
    table: dict[float, torch.Tensor],
) -> VelocityFn:
    """The network in one stage as a function of x, u and the length of an interval, which only average velocities use.

    It computes in the plan's precision; float32 out, like the ODE's state. table: from `_modulations`.
    """

    def network(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        time = model_time(plan.schedule, stage, torch.full((x.shape[0],), u, device=x.device))
        more = {"lengths": torch.full_like(time, length)} if plan.mean_velocity else {}
        more |= {"modulations": table[u]} if table else {}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.bf16):
            return model.velocity(x, time, stage, condition, labels, **more).float()

    return network


def stage_velocities(
    model: StagedModel, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The velocity of every stage at keyed states, contexts and times: K of [B, C, h_k, w_k]."""
    stages = range(plan.schedule.num_stages)

    # Noise stands in for states and contexts: what is compared is the network, not a sample.
    fed_back = [] if plan.tau is None else stages[:-1]
    draws = [Draw(Purpose.NOISE, plan.shape(stage), stage) for stage in stages]
    draws += [Draw(Purpose.CONTEXT, plan.shape(stage), stage) for stage in fed_back]
    draws += [Draw(Purpose.TIME, stream=stage, is_normal=False) for stage in stages]
    drawn = draw_all(seed, indices, draws)

    # K states, the contexts, K times.
    states = drawn[: len(stages)]
    contexts = drawn[len(stages) : -len(stages)]
    times = [model_time(plan.schedule, stage, u) for stage, u in zip(stages, drawn[-len(stages) :], strict=True)]
    if not plan.mean_velocity:
        return model(contexts, states, times, labels)
    averaging = cast("MeanVelocityModel", model)
    lengths = [1.0 - u for u in drawn[-len(stages) :]]  # to the end of the stage
    return averaging.all_velocities(states, times, averaging.conditions(contexts, labels), labels, lengths)
