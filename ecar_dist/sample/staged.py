"""A model with a velocity in each stage behind the sampler of flow/multistage.py."""

from __future__ import annotations

import torch

from ecar_dist.flow.guidance import guide, stage_guidance_scales
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.path import model_time
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.models.staged import StagedModel
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.sample.sampling_plan import SamplingPlan


def draw_stages(
    model: StagedModel, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """X^e_k of every stage, [B, C, h_k, w_k]. Labels and indices int64 [B]."""
    schedule = plan.schedule
    scales = stage_guidance_scales(plan.guidance_scale, schedule.num_stages, plan.guidance_ramp)
    guided = any(scale != 1.0 for scale in scales)
    both_labels = torch.cat((labels, torch.full_like(labels, plan.null_label))) if guided else labels
    cache = model.start_cache()

    def draw(purpose: Purpose, stage: int) -> torch.Tensor:
        return normal(seed, indices, purpose, plan.shape(stage), stream=stage)

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        # The null pass of the AR transformer runs even where the flow needs none: later null blocks attend to it.
        if context is not None and guided:
            context = torch.cat((context, context))
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=plan.bf16):
            condition = model.begin_stage(stage, context, both_labels, cache)
        return _velocity_fn(model, plan, stage, condition, labels, both_labels, scales[stage])

    return sample_stages(
        schedule,
        begin_stage,
        draw,
        tau=plan.tau,
        solver=SOLVERS[plan.solver],
        steps_per_stage=(plan.steps_per_stage,) * schedule.num_stages,
    )


def _velocity_fn(
    model: StagedModel,
    plan: SamplingPlan,
    stage: int,
    condition: torch.Tensor | None,
    labels: torch.Tensor,
    both_labels: torch.Tensor,
    scale: float,
) -> VelocityFn:
    """The guided velocity of one stage; without a null pass where the scale is 1."""
    own_condition = None if condition is None else condition[: labels.shape[0]]

    def network(x: torch.Tensor, u: float, condition: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        time = model_time(plan.schedule, stage, torch.full((x.shape[0],), u, device=x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.bf16):
            return model.velocity(x, time, stage, condition, labels).float()

    def conditional(x: torch.Tensor, u: float) -> torch.Tensor:
        return network(x, u, own_condition, labels)

    def guided(x: torch.Tensor, u: float) -> torch.Tensor:
        velocity, null_velocity = network(torch.cat((x, x)), u, condition, both_labels).chunk(2)
        return guide(velocity, null_velocity, scale)

    return conditional if scale == 1.0 else guided


def stage_velocities(
    model: StagedModel, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The velocity of every stage at keyed states, contexts and times: K of [B, C, h_k, w_k]."""
    stages = range(plan.schedule.num_stages)

    def noise(purpose: Purpose, stage: int) -> torch.Tensor:
        return normal(seed, indices, purpose, plan.shape(stage), stream=stage)

    times = [model_time(plan.schedule, stage, uniform(seed, indices, Purpose.TIME, stream=stage)) for stage in stages]
    contexts = [] if plan.tau is None else [noise(Purpose.CONTEXT, stage) for stage in stages[:-1]]
    return model(contexts, [noise(Purpose.NOISE, stage) for stage in stages], times, labels)
