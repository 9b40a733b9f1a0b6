"""What one micro-batch computes: from the loader's values to the loss. Section 7.1 of docs/ecar.md."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from ecar_dist.config.run import RunConfig
from ecar_dist.flow.loss import masked_loss, multistage_loss, stage_losses
from ecar_dist.flow.masking import mask_ratio, random_mask, token_points
from ecar_dist.flow.mean_velocity import Interval, splitting_targets
from ecar_dist.flow.path import logit_normal_times, model_time, training_points
from ecar_dist.models.layers import patchify
from ecar_dist.models.staged import MeanVelocityModel
from ecar_dist.rng import Draw, Purpose, draw_all

HELDOUT_SEED = int.from_bytes(b"heldout", "big")  # of the noise on held-out samples

Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (values as read, N(0, I) noise) -> latents


@dataclass(frozen=True)
class Drawn:
    """The random numbers of a batch, except those of the labels.

    times: within each stage, K of [B]; of masked tokens, R draws of [B, T].
    noise: of each stage, K of [B, C, h_k, w_k]; of masked tokens, R of the full size.
    posterior: noise of the autoencoder's posterior, [B, C, H, W].
    context: noise on the states that are fed back, K - 1 of [B, C, h_k, w_k].
    mask: for masked tokens U(0, 1), the ratio [B] and the order [B, T].
    intervals: of average velocities, one for each stage.
    """

    times: list[torch.Tensor]
    noise: list[torch.Tensor]
    posterior: torch.Tensor
    context: list[torch.Tensor] = field(default_factory=list)
    mask: tuple[torch.Tensor, ...] = ()
    intervals: list[Interval] = field(default_factory=list)


class Objective(nn.Module, ABC):
    """The module DeepSpeed wraps: the model, and the loss around it.

    Every random number is keyed by the sample's position in the run, so the loss of a global batch does not depend on
    how it is split across ranks and micro-batches. Latents, targets and loss are float32; under bf16 only the model's
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

    def forward(
        self, values: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The training loss. Labels are dropped for classifier-free guidance."""
        draws = [*self._draws(), Draw(Purpose.LABEL_DROP, is_normal=False)]
        *numbers, label_u = draw_all(self._seed, positions, draws)
        drawn = self._sorted(numbers)

        labels = torch.where(label_u < self._config.model.label_dropout, self._config.data.num_classes, labels)
        per_stage = self.losses(self._normalise(values, drawn.posterior), labels, drawn)
        return multistage_loss(per_stage, self._weights), per_stage.detach(), self._single_times(drawn)

    @torch.no_grad()
    def heldout_losses(
        self, moments: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, time: float, normalise: Normalise
    ) -> torch.Tensor:
        """The stage losses [B, K] at one fixed time within every stage, with noise determined by `keys` (int64 [B]).

        The noise is the same in all runs, whatever their seed. `normalise` is that of the held-out moments.
        """
        drawn = self._sorted(draw_all(HELDOUT_SEED, keys, self._draws()))
        drawn = replace(drawn, times=[torch.full_like(one, time) for one in drawn.times], intervals=[])
        return self.losses(normalise(moments, drawn.posterior), labels, drawn)

    @abstractmethod
    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """The loss of each sample in each stage, [B, K], from latents [B, C, H, W], labels [B] and fixed noise."""

    @abstractmethod
    def _draws(self) -> list[Draw]:
        """The draws that `losses` needs for each sample."""

    @abstractmethod
    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        """The numbers of `_draws`, by their meaning."""

    def _single_times(self, drawn: Drawn) -> torch.Tensor:
        """The time of each stage loss, [B, K]; NaN where it has no single one."""
        return torch.stack(drawn.times, dim=1)

    def _predict(self, *inputs: Any) -> Any:
        """The model's output in the run's precision."""
        with torch.autocast(inputs[-1].device.type, torch.bfloat16, enabled=self._bf16):
            return self.model(*inputs)

    def _noise(self, purpose: Purpose, size: int, stream: int = 0) -> Draw:
        """A field of noise on one stage's latents, [B, C, size, size]."""
        return Draw(purpose, (self._config.data.latent_channels, size, size), stream)


class FlowObjective(Objective):
    """Flow matching in every stage, eq. (5)."""

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        # Points on the path, and the velocities that the model is to predict there.
        tau = self._config.context_tau
        points = training_points(self._schedule, latents, drawn.noise, drawn.times, drawn.context, tau)

        velocities = self._predict(points.contexts, points.states, points.times, labels)
        return stage_losses(velocities, points.targets)

    def _draws(self) -> list[Draw]:
        # For each stage one time and one noise; more noise for the states that are fed back as context.
        fed_back = [] if self._config.context_tau is None else self._sizes[:-1]
        draws = [self._noise(Purpose.NOISE, size, k) for k, size in enumerate(self._sizes)]
        draws += [self._noise(Purpose.CONTEXT, size, k) for k, size in enumerate(fed_back)]
        draws += [Draw(Purpose.TIME, stream=k, is_normal=False) for k in range(len(self._sizes))]

        # One more for the autoencoder's posterior.
        return [*draws, self._noise(Purpose.POSTERIOR, self._sizes[-1])]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        num_stages = len(self._sizes)
        *fields, posterior = numbers
        times = fields[-num_stages:]
        if self._config.flow.times == "logit_normal":
            times = [logit_normal_times(u) for u in times]
        return Drawn(times, fields[:num_stages], posterior, context=fields[num_stages:-num_stages])


class MeanVelocityObjective(FlowObjective):
    """Average velocities over intervals of every stage, section 11 of docs/ecar.md.

    Held-out samples have no intervals: their losses are those of the velocity.
    """

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        if not drawn.intervals:
            return super().losses(latents, labels, drawn)

        # Points on the paths at the starts of the intervals, and the velocities of the paths.
        starts = [each.start for each in drawn.intervals]  # K x [B]
        tau = self._config.context_tau
        points = training_points(self._schedule, latents, drawn.noise, starts, drawn.context, tau)

        # One condition serves the prediction and its targets. No gradient reaches it from the targets.
        model = cast("MeanVelocityModel", self.model)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self._bf16):
            condition = model.conditions(points.contexts, labels)

            def mean_velocity(
                states: Sequence[torch.Tensor], starts: Sequence[torch.Tensor], lengths: Sequence[torch.Tensor]
            ) -> list[torch.Tensor]:
                times = [model_time(self._schedule, k, u) for k, u in enumerate(starts)]
                return model.all_velocities(states, times, condition, labels, lengths)

            targets = splitting_targets(mean_velocity, points.states, points.targets, drawn.intervals)
            predicted = mean_velocity(points.states, starts, [each.length for each in drawn.intervals])
        return stage_losses(predicted, targets)

    def _draws(self) -> list[Draw]:
        # Four more numbers for the interval of each stage.
        return [*(Draw(Purpose.INTERVAL, (4,), k, is_normal=False) for k in range(len(self._sizes))), *super()._draws()]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        num_stages = len(self._sizes)
        drawn = super()._sorted(numbers[num_stages:])
        flow = self._config.flow
        pairs = zip(drawn.times, numbers[:num_stages], strict=True)
        return replace(drawn, intervals=[Interval.draw(*pair, flow.instant_share, flow.whole_share) for pair in pairs])

    def _single_times(self, drawn: Drawn) -> torch.Tensor:
        return torch.stack([each.start for each in drawn.intervals], dim=1)


class MaskedObjective(Objective):
    """Flow matching of masked tokens, each with several draws of noise and time.

    The loss is the mean over a sample's masked tokens, then over samples, so that a sample's mask ratio does not change
    its weight. There is one stage, K = 1.
    """

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        patch_size = self._config.model.patch_size
        ratio_u, order_u = drawn.mask
        mask = random_mask(order_u, mask_ratio(ratio_u))  # [B, T]

        # The points on the path.
        tokens = patchify(latents, patch_size)  # [B, T, c]
        noise = torch.stack([patchify(one, patch_size) for one in drawn.noise], dim=1)  # [B, R, T, c]
        times = torch.stack(drawn.times, dim=1)  # [B, R, T]
        states, targets = token_points(tokens, noise, times)  # [B, R, T, c]

        # Prediction and loss of the masked tokens only.
        velocities = self._predict(tokens, mask, states, model_time(self._schedule, 0, times), labels)
        return masked_loss(velocities, targets, mask)[:, None]  # [B, 1]

    def _draws(self) -> list[Draw]:
        (size,) = self._sizes
        (num_tokens,) = self._config.stage_tokens

        # R draws of noise and time for each token.
        num_draws = self._config.flow.token_draws
        draws = [self._noise(Purpose.NOISE, size, r) for r in range(num_draws)]
        draws += [Draw(Purpose.TIME, (num_tokens,), r, is_normal=False) for r in range(num_draws)]

        # The share of a sample's tokens that is masked; a random order, which decides which ones; the posterior.
        draws += [Draw(Purpose.MASK_RATIO, is_normal=False), Draw(Purpose.MASK_ORDER, (num_tokens,), is_normal=False)]
        return [*draws, self._noise(Purpose.POSTERIOR, size)]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        num_draws = self._config.flow.token_draws
        *drawn, ratio_u, order_u, posterior = numbers
        return Drawn(drawn[num_draws:], drawn[:num_draws], posterior, mask=(ratio_u, order_u))

    def _single_times(self, drawn: Drawn) -> torch.Tensor:
        return torch.full_like(drawn.times[0][:, :1], math.nan)  # [B, 1]
