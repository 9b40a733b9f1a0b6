"""The training losses of token models: codes, and continuous tokens in the order of regions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ecar_dist.flow.loss import code_loss, masked_code_loss, token_loss
from ecar_dist.flow.masking import arccosine_ratio, random_mask, token_points
from ecar_dist.flow.path import model_time
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Draw, Purpose
from ecar_dist.train.objective import Drawn, Objective


class CodeObjective(Objective):
    """Cross-entropy of the codes, in nats per token; K = 1. Only the autoencoder's posterior is random."""

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        logits, codes = self._predict(patchify(latents, self._config.model.patch_size), labels)
        return code_loss(logits, codes)[:, None]  # [B, 1]

    def _draws(self) -> list[Draw]:
        return [self._noise(Purpose.POSTERIOR, self._sizes[-1])]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        (posterior,) = numbers
        return Drawn([], [], posterior)

    def _single_times(self, drawn: Drawn) -> torch.Tensor:
        return drawn.posterior.new_full((len(drawn.posterior), 1), math.nan)


class GroupedFlowObjective(Objective):
    """Flow matching of every token, each with several draws of noise and time; K = 1."""

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        # The points on the path.
        patch_size = self._config.model.patch_size
        tokens = patchify(latents, patch_size)  # [B, N, c]
        noise = torch.stack([patchify(one, patch_size) for one in drawn.noise], dim=1)  # [B, R, N, c]
        times = torch.stack(drawn.times, dim=1)  # [B, R, N]
        states, targets = token_points(tokens, noise, times)  # [B, R, N, c]

        velocities = self._predict(tokens, states, model_time(self._schedule, 0, times), labels)
        return token_loss(velocities, targets)[:, None]  # [B, 1]

    def _draws(self) -> list[Draw]:
        # R draws of noise and time for each token; the posterior.
        (size,) = self._sizes
        num_draws = self._config.flow.token_draws
        draws = [self._noise(Purpose.NOISE, size, r) for r in range(num_draws)]
        draws += [Draw(Purpose.TIME, self._config.stage_tokens, r, is_normal=False) for r in range(num_draws)]
        return [*draws, self._noise(Purpose.POSTERIOR, size)]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        num_draws = self._config.flow.token_draws
        *drawn, posterior = numbers
        return Drawn(drawn[num_draws:], drawn[:num_draws], posterior)

    def _single_times(self, drawn: Drawn) -> torch.Tensor:
        return torch.full_like(drawn.times[0][:, :1], math.nan)  # [B, 1]


class HybridObjective(GroupedFlowObjective):
    """Cross-entropy of the masked codes, plus flow matching of the residuals of all tokens; K = 1."""

    def losses(self, latents: torch.Tensor, labels: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """See `Objective`."""
        patch_size = self._config.model.patch_size
        ratio_u, order_u = drawn.mask
        mask = random_mask(order_u, arccosine_ratio(ratio_u))  # [B, T]

        # The model knows the codes, so it also computes the residuals and the points on their paths.
        noise = torch.stack([patchify(one, patch_size) for one in drawn.noise], dim=1)  # [B, R, T, c]
        u = torch.stack(drawn.times, dim=1)  # [B, R, T]
        times = model_time(self._schedule, 0, u)
        found = self._predict(patchify(latents, patch_size), mask, noise, u, times, labels)
        logits, codes, velocities, targets = found
        return (masked_code_loss(logits, codes, mask) + token_loss(velocities, targets))[:, None]  # [B, 1]

    def _draws(self) -> list[Draw]:
        # The share of a sample's tokens that is masked; and a random order, which decides which ones.
        *draws, posterior = super()._draws()
        masks = [Draw(Purpose.MASK_RATIO, is_normal=False)]
        masks += [Draw(Purpose.MASK_ORDER, self._config.stage_tokens, is_normal=False)]
        return [*draws, *masks, posterior]

    def _sorted(self, numbers: list[torch.Tensor]) -> Drawn:
        *drawn, ratio_u, order_u, posterior = numbers
        return replace(super()._sorted([*drawn, posterior]), mask=(ratio_u, order_u))
