"""The settings that, with the weights, a label, an index and a seed, determine a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.flow.guidance import is_guided
from ecar_dist.flow.schedule import StageSchedule


@dataclass(frozen=True)
class SamplingPlan:
    """The settings of the sampler.

    tau is None for a model that is fed no states. Only `mar` uses ar_steps, only `par` top_k and jacobi_window, only
    `hybrid` code_steps and residuals; `par` and `hybrid` use temperature. mean_velocity: the network gives average
    velocities (flow/mean_velocity.py). merge_ratio: share of the tokens that are merged in the last stage.
    modulates_ahead: adaLN is computed for all calls of a stage at once, outside of the blocks that it belongs to.
    """

    kind: str
    schedule: StageSchedule
    stage_sizes: tuple[int, ...]
    channels: int
    null_label: int
    tau: float | None
    solver: str
    steps_per_stage: tuple[int, ...]
    time_shift: float
    guidance_scale: float
    guidance_ramp: str
    ar_steps: int
    bf16: bool
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    mean_velocity: bool = False
    merge_ratio: float = 0.0
    modulates_ahead: bool = True
    temperature: float = 1.0
    top_k: int = 0
    jacobi_window: int = 1
    code_steps: int = 12
    residuals: bool = True

    @staticmethod
    def from_config(config: RunConfig, device: torch.device) -> SamplingPlan:
        """The plan of `config.sample`, in the run's precision."""
        sample = config.sample
        return SamplingPlan(
            kind=config.model.kind,
            schedule=config.flow.schedule,
            stage_sizes=config.stage_sizes,
            channels=config.data.latent_channels,
            null_label=config.data.num_classes,
            tau=config.context_tau,
            solver=sample.solver,
            steps_per_stage=config.stage_steps,
            time_shift=sample.time_shift,
            guidance_scale=sample.guidance_scale,
            guidance_ramp=sample.guidance_ramp,
            ar_steps=sample.ar_steps,
            bf16=config.precision_on(device.type) == "bf16",
            guidance_interval=sample.guidance_interval,
            mean_velocity=config.flow.learns_mean_velocity,
            merge_ratio=sample.merge_ratio,
            temperature=sample.temperature,
            top_k=sample.top_k,
            jacobi_window=sample.jacobi_window,
            code_steps=sample.code_steps,
            residuals=sample.residuals,
        )

    def guided_at(self, stage: int, guidance_scale: float) -> Callable[[float], bool]:
        """Whether the velocity of a stage is guided, as a function of its time u."""
        return lambda u: is_guided(guidance_scale, self.guidance_interval, self.schedule.model_time(stage, u))

    def shape(self, stage: int) -> tuple[int, int, int]:
        """[C, h, w] of a stage's latents."""
        return self.channels, self.stage_sizes[stage], self.stage_sizes[stage]
