"""The sampler of the kinds with a velocity in each stage: their network behind flow/multistage.py."""

from __future__ import annotations

from typing import cast

import torch

from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.models.staged import MeanVelocityModel, StagedModel
from ecar_dist.rng import Draw, Purpose, draw_all
from ecar_dist.sample.guided import guided_velocity, with_null
from ecar_dist.sample.sampling_plan import SamplingPlan


def draw_stages(
    model: StagedModel, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """X^e_k of every stage, [B, C, h_k, w_k]; section 8 of docs/ecar.md. Labels and indices int64 [B]."""
    batch = labels.shape[0]
    schedule = plan.schedule
    scales = stage_guidance_scales(plan.guidance_scale, schedule.num_stages, plan.guidance_ramp)
    guided = any(scale != 1.0 for scale in scales)
    all_labels = with_null(labels, plan.null_label) if guided else labels  # [B or 2 B]
    cache = model.start_cache()

    # All noise of the batch in one pass: where it starts, at the jumps, and on the states that are fed back.
    later = range(1, schedule.num_stages)
    uses = [(Purpose.GENERATE_START, 0), *((Purpose.GENERATE_JUMP, stage) for stage in later)]
    uses += [(Purpose.GENERATE_CONTEXT, stage - 1) for stage in later if plan.tau]
    draws = [Draw(purpose, plan.shape(stage), stage) for purpose, stage in uses]
    noise = dict(zip(uses, draw_all(seed, indices, draws), strict=True))

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        # The token maps, once a stage. The null half is made even where the flow does not need it, because the null
        # blocks of later stages attend to it. Both halves are fed the same states.
        if context is not None and guided:
            context = torch.cat((context, context))
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=plan.bf16):
            condition = model.begin_stage(stage, context, all_labels, cache)

        # The flow, many times a stage. Where it is not guided, it needs the conditional half alone.
        half = None if condition is None else condition[:batch]
        plain = _network(model, plan, stage, half, labels)
        doubled = _network(model, plan, stage, condition, all_labels)
        return guided_velocity(plain, doubled, scales[stage], plan.guided_at(stage, scales[stage]))

    return sample_stages(
        schedule,
        begin_stage,
        lambda purpose, stage: noise[purpose, stage],
        tau=plan.tau,
        solver=SOLVERS[plan.solver],
        steps_per_stage=plan.steps_per_stage,
        time_shift=plan.time_shift,
    )


def _network(
    model: StagedModel, plan: SamplingPlan, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
) -> VelocityFn:
    """The network in one stage as a function of x, u and the length of an interval, which only average velocities have.

    It computes in the plan's precision; float32 out, as the ODE's state.
    """

    def network(x: torch.Tensor, u: float, length: float = 0.0) -> torch.Tensor:
        time = model_time(plan.schedule, stage, torch.full((x.shape[0],), u, device=x.device))
        interval = (torch.full_like(time, length),) if plan.mean_velocity else ()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.bf16):
            return model.velocity(x, time, stage, condition, labels, *interval).float()

    return network


def stage_velocities(
    model: StagedModel, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The velocity of every stage at keyed states, contexts and times: K of [B, C, h_k, w_k]."""
    stages = range(plan.schedule.num_stages)

    # Noise stands for states and contexts: what is compared is the network, not a sample.
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
