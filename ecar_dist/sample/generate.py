"""From labels to latents: the trained model behind the sampler of flow/multistage.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ecar_dist.config import RunConfig
from ecar_dist.flow.guidance import guide, stage_guidance_scales
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.path import model_time
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.models.ecar import ECAR
from ecar_dist.rng import Purpose, normal


@dataclass(frozen=True)
class SamplingPlan:
    """What fixes a sample, beside the weights, its label and its index."""

    schedule: StageSchedule
    stage_sizes: tuple[int, ...]
    channels: int
    null_label: int
    tau: float
    solver: str
    steps_per_stage: int
    guidance_scale: float
    guidance_ramp: str
    bf16: bool

    @staticmethod
    def from_config(config: RunConfig, device: torch.device, *, guidance_scale: float | None = None) -> SamplingPlan:
        """The plan of `config.sample`, in the run's precision; `guidance_scale` overrides."""
        sample = config.sample
        return SamplingPlan(
            schedule=StageSchedule(config.flow.resolved_ends, config.flow.gamma),
            stage_sizes=config.stage_sizes,
            channels=config.data.latent_channels,
            null_label=config.data.num_classes,
            tau=config.flow.context.tau,
            solver=sample.solver,
            steps_per_stage=sample.steps_per_stage,
            guidance_scale=sample.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_ramp=sample.guidance_ramp,
            bf16=config.precision_on(device.type) == "bf16",
        )


@torch.no_grad()
def generate(
    model: ECAR, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """Draw one sample per label; returns X^e_k of every stage, [B, C, h_k, w_k], the last one the normalised latent.

    labels int64 [B]; indices int64 [B] name the samples: sample i of a seed is the same whatever the batch around it.
    """
    schedule = plan.schedule
    scales = stage_guidance_scales(plan.guidance_scale, schedule.num_stages, plan.guidance_ramp)
    guided = any(scale != 1.0 for scale in scales)
    both_labels = torch.cat((labels, torch.full_like(labels, plan.null_label))) if guided else labels
    cache = model.start_cache()

    def draw(purpose: Purpose, stage: int) -> torch.Tensor:
        size = plan.stage_sizes[stage]
        return normal(seed, indices, purpose, (plan.channels, size, size), stream=stage)

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        # The null pass of the AR transformer runs even where the flow needs none: later null blocks attend to it.
        if context is not None and guided:
            context = torch.cat((context, context))
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=plan.bf16):
            condition = model.condition(model.next_token_map(stage, context, both_labels, cache))
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
    model: ECAR,
    plan: SamplingPlan,
    stage: int,
    condition: torch.Tensor,
    labels: torch.Tensor,
    both_labels: torch.Tensor,
    scale: float,
) -> VelocityFn:
    """The guided velocity of one stage; without a null pass where the scale is 1."""
    batch = labels.shape[0]

    def network(x: torch.Tensor, u: float, condition: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        time = model_time(plan.schedule, stage, torch.full((x.shape[0],), u, device=x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=plan.bf16):
            return model.velocity(x, time, stage, condition, labels).float()

    def conditional(x: torch.Tensor, u: float) -> torch.Tensor:
        return network(x, u, condition[:batch], labels)

    def guided(x: torch.Tensor, u: float) -> torch.Tensor:
        velocity, null_velocity = network(torch.cat((x, x)), u, condition, both_labels).chunk(2)
        return guide(velocity, null_velocity, scale)

    return conditional if scale == 1.0 else guided


def generate_in_batches(
    model: ECAR, plan: SamplingPlan, labels: torch.Tensor, seed: int, batch_size: int
) -> Iterator[list[torch.Tensor]]:
    """`generate` for sample 0, 1, 2, ... of a seed, `batch_size` at a time."""
    indices = torch.arange(labels.shape[0], device=labels.device)
    for chunk in indices.split(batch_size):
        yield generate(model, plan, labels[chunk], chunk, seed)
