"""What one micro-batch computes: values of the loader in, the loss out. Section 7.1 of docs/ecar.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ecar_dist.config import RunConfig
from ecar_dist.flow.loss import multistage_loss, stage_losses
from ecar_dist.flow.path import training_points
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.rng import Purpose, normal, uniform

Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (values as read, N(0, I) noise) -> latents


class FlowObjective(nn.Module):
    """The module DeepSpeed wraps: the model, and the loss around it.

    Every random number is keyed by the sample's position in the run, so the loss of a global batch does not depend on
    how it is cut into ranks and micro-batches. Pyramids, targets and loss are float32; under bf16 only the model's
    matrix products are not.
    """

    def __init__(
        self, model: nn.Module, schedule: StageSchedule, normalise: Normalise, config: RunConfig, precision: str
    ) -> None:
        super().__init__()
        self.model = model
        self._schedule, self._normalise = schedule, normalise
        self._seed, self._sizes = config.run.seed, config.stage_sizes
        self._channels, self._null_label = config.data.latent_channels, config.data.num_classes
        self._tau, self._weights = config.flow.context.tau, config.flow.resolved_stage_weights
        self._label_dropout, self._bf16 = config.model.label_dropout, precision == "bf16"

    def forward(
        self, values: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch as read (raw moments [B, 2C or C, H, W], or pixels for a normaliser that encodes them), labels and
        positions int64 [B] -> loss [], stage losses [B, K], and their times within the stages, in (0, 1) [B, K]."""
        times = [uniform(self._seed, positions, Purpose.TIME, stream=k) for k in range(len(self._sizes))]
        points = training_points(
            self._schedule,
            self._normalise(values, self._noise(positions, Purpose.POSTERIOR, self._sizes[-1], 0)),
            [self._noise(positions, Purpose.NOISE, size, k) for k, size in enumerate(self._sizes)],
            times,
            [self._noise(positions, Purpose.CONTEXT, size, k) for k, size in enumerate(self._sizes[:-1])],
            self._tau,
        )
        dropped = uniform(self._seed, positions, Purpose.LABEL_DROP) < self._label_dropout
        labels = torch.where(dropped, self._null_label, labels)
        with torch.autocast(values.device.type, torch.bfloat16, enabled=self._bf16):
            velocities = self.model(points.contexts, points.states, points.times, labels)
        per_stage = stage_losses(velocities, points.targets)
        return multistage_loss(per_stage, self._weights), per_stage.detach(), torch.stack(times, dim=1)

    def _noise(self, positions: torch.Tensor, purpose: Purpose, size: int, stage: int) -> torch.Tensor:
        return normal(self._seed, positions, purpose, (self._channels, size, size), stream=stage)
