"""What one micro-batch computes: from the loader's values to the loss. Section 7.1 of docs/ecar.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.flow.loss import masked_loss, multistage_loss, stage_losses
from ecar_dist.flow.masking import mask_ratio, random_mask, token_points
from ecar_dist.flow.path import model_time, training_points
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Draw, Purpose, draw_all

Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (values as read, N(0, I) noise) -> latents


class Objective(nn.Module):
    """The module DeepSpeed wraps: the model, and the loss around it.

    Every random number is keyed by the sample's position in the run, so the loss of a global batch does not depend on
    how it is split into ranks and micro-batches. Latents, targets and loss are float32; under bf16 only the model's
    matrix products are not.

    `forward` takes a batch as the loader reads it (raw moments [B, 2C or C, H, W], or pixels where `normalise` encodes
    them), labels and positions int64 [B]. It returns the loss [], the stage losses [B, K], and their times within the
    stages [B, K], in (0, 1), or NaN for a loss that has no single time.
    """

    def __init__(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> None:
        super().__init__()
        self.model = model
        self._normalise = normalise
        self._config = config
        self._schedule = config.flow.schedule
        self._seed = config.run.seed
        self._sizes = config.stage_sizes
        self._weights = config.flow.resolved_stage_weights
        self._bf16 = precision == "bf16"

    def _noise(self, purpose: Purpose, size: int, stream: int = 0) -> Draw:
        """A field of noise on one stage's latents, [B, C, size, size]."""
        return Draw(purpose, (self._config.data.latent_channels, size, size), stream)

    def _dropped(self, labels: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The labels [B], some of them replaced by the null label; u [B] from U(0, 1)."""
        return torch.where(u < self._config.model.label_dropout, self._config.data.num_classes, labels)


class FlowObjective(Objective):
    """Flow matching in every stage, eq. (5)."""

    def forward(
        self, values: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        # For each stage one time and one noise; more noise for the states that are fed back as context.
        tau = self._config.context_tau
        num_stages = len(self._sizes)
        fed_back = [] if tau is None else self._sizes[:-1]
        draws = [self._noise(Purpose.NOISE, size, k) for k, size in enumerate(self._sizes)]
        draws += [self._noise(Purpose.CONTEXT, size, k) for k, size in enumerate(fed_back)]
        draws += [Draw(Purpose.TIME, stream=k, is_normal=False) for k in range(num_stages)]

        # One more for the autoencoder's posterior, and one for the labels.
        draws += [self._noise(Purpose.POSTERIOR, self._sizes[-1]), Draw(Purpose.LABEL_DROP, is_normal=False)]
        *drawn, posterior_noise, label_u = draw_all(self._seed, positions, draws)
        noise = drawn[:num_stages]
        context_noise = drawn[num_stages:-num_stages]
        times = drawn[-num_stages:]  # K x [B]

        # Points on the path, and the velocities that the model is to predict there.
        latents = self._normalise(values, posterior_noise)  # [B, C, H, W]
        points = training_points(self._schedule, latents, noise, times, context_noise, tau)

        # Prediction and loss. Labels are dropped for classifier-free guidance.
        labels = self._dropped(labels, label_u)
        with torch.autocast(values.device.type, torch.bfloat16, enabled=self._bf16):
            velocities = self.model(points.contexts, points.states, points.times, labels)
        per_stage = stage_losses(velocities, points.targets)
        return multistage_loss(per_stage, self._weights), per_stage.detach(), torch.stack(times, dim=1)


class MaskedObjective(Objective):
    """Flow matching of masked tokens, each with several draws of noise and time.

    The loss is the mean over a sample's masked tokens, then over samples, so that a sample's mask ratio does not change
    its weight.
    """

    def forward(
        self, values: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Objective`; there is one stage, K = 1."""
        patch_size = self._config.model.patch_size
        (size,) = self._sizes
        (num_tokens,) = self._config.stage_tokens

        # R draws of noise and time for each token.
        num_draws = self._config.flow.token_draws
        draws = [self._noise(Purpose.NOISE, size, r) for r in range(num_draws)]
        draws += [Draw(Purpose.TIME, (num_tokens,), r, is_normal=False) for r in range(num_draws)]

        # The share of a sample's tokens that is masked, and which: by a random order. The posterior, and the labels.
        draws += [Draw(Purpose.MASK_RATIO, is_normal=False), Draw(Purpose.MASK_ORDER, (num_tokens,), is_normal=False)]
        draws += [self._noise(Purpose.POSTERIOR, size), Draw(Purpose.LABEL_DROP, is_normal=False)]
        *drawn, ratio_u, order_u, posterior_noise, label_u = draw_all(self._seed, positions, draws)
        mask = random_mask(order_u, mask_ratio(ratio_u))  # [B, T]

        # The points on the path that they give.
        tokens = patchify(self._normalise(values, posterior_noise), patch_size)  # [B, T, c]
        noise = [patchify(field, patch_size) for field in drawn[:num_draws]]
        times = torch.stack(drawn[num_draws:], dim=1)  # [B, R, T]
        states, targets = token_points(tokens, torch.stack(noise, dim=1), times)  # [B, R, T, c]

        # Prediction and loss of the masked tokens alone.
        labels = self._dropped(labels, label_u)
        with torch.autocast(values.device.type, torch.bfloat16, enabled=self._bf16):
            velocities = self.model(tokens, mask, states, model_time(self._schedule, 0, times), labels)
        per_stage = masked_loss(velocities, targets, mask)[:, None]  # [B, 1]
        return multistage_loss(per_stage, self._weights), per_stage.detach(), torch.full_like(per_stage, math.nan)
