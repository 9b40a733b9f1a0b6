"""ECAR: an AR transformer makes a token map for each stage; a velocity network conditioned on it draws the latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.attention import KVCache
from ecar_dist.models.autoregressive import TokenMapTransformer
from ecar_dist.models.velocity import VelocityNetwork


class ECAR(nn.Module):
    """Both networks, trained end to end.

    Arguments:
        preset: depths, widths and heads.
        stage_sizes: latent side of each of the K stages, coarse to fine, each twice the previous one.
        latent_channels: C.
        patch_size: p; a stage of side h has (h / p)^2 tokens.
        num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
        context_scales: K - 1 factors that scale the contexts to unit variance.
        feeds_state: False ignores the contexts (`class_only`).
        mean_velocity: the velocity network gives average velocities, and receives the lengths of their intervals.
        recompute: the backward pass recomputes each transformer block instead of keeping its activations.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        stage_sizes: Sequence[int],
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        context_scales: Sequence[float],
        feeds_state: bool,
        mean_velocity: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        # A token is a patch of p x p latent pixels with C channels.
        sides = [size // patch_size for size in stage_sizes]
        channels = latent_channels * patch_size**2

        # Token maps M_k, once per stage.
        self.ar = TokenMapTransformer(
            preset,
            grid_sides=sides,
            token_channels=channels,
            patch_size=patch_size,
            num_classes=num_classes,
            context_scales=context_scales,
            feeds_state=feeds_state,
            recompute=recompute,
        )

        # Velocities conditioned on these maps, at each solver call.
        self.flow = VelocityNetwork(
            preset,
            grid_sides=sides,
            token_channels=channels,
            patch_size=patch_size,
            num_classes=num_classes,
            condition_width=preset.ar_width,
            mean_velocity=mean_velocity,
            recompute=recompute,
        )

    def forward(
        self,
        contexts: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        labels: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Velocities of all stages, one pass of each network; float32, K of [B, C, h_k, w_k].

        Arguments:
            contexts: C_0 .. C_{K-2}, [B, C, h_k, w_k]; C_k feeds the token map of stage k + 1.
            states: x_u of every stage, [B, C, h_k, w_k].
            times: model time of every stage in [0, 1], float32 [B].
            labels: int64 [B]; num_classes is the null label.
        """
        # One AR pass for all stages, then one velocity pass under their maps. Gradients reach both.
        return self.all_velocities(states, times, self.conditions(contexts, labels), labels)

    def conditions(self, contexts: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """W_m M_k of all stages side by side, [B, T_0 + .. + T_{K-1}, d_f]."""
        return self.condition(self.ar(contexts, labels, masked=False))

    def all_velocities(
        self,
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        condition: torch.Tensor,
        labels: torch.Tensor,
        lengths: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """See `MeanVelocityModel`."""
        return self.flow.all_stages(states, times, condition, labels, lengths)

    def token_maps(
        self, contexts: Sequence[torch.Tensor], labels: torch.Tensor, *, masked: bool = False
    ) -> list[torch.Tensor]:
        """M_0 .. M_{K-1}, [B, T_k, d_a], in one pass. `masked` selects the slower reference attention."""
        return list(self.ar(contexts, labels, masked=masked).split(self.ar.stage_tokens, dim=1))

    def start_cache(self) -> KVCache:
        """An empty cache for `next_token_map`; one for each batch that is sampled."""
        return KVCache(self.ar.depth)

    def begin_stage(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """The condition of `stage`, [B, T_k, d_f]; arguments as for `next_token_map`."""
        # Projected once per stage; the solver's calls add it to their tokens.
        return self.condition(self.next_token_map(stage, context, labels, cache))

    def next_token_map(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """M_stage, [B, T_k, d_a], from C_{stage-1} (None at stage 0) and the cache; stages must come in order."""
        return self.ar.next_stage(stage, context, labels, cache)

    def condition(self, token_map: torch.Tensor) -> torch.Tensor:
        """W_m M_k, [B, T_k, d_f]: what `velocity` adds to its tokens. Once per stage, not per solver call."""
        return self.flow.condition_projection(token_map)

    def velocity(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        stage: int,
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MeanVelocityModel`; the method `condition` makes the argument `condition`."""
        return self.flow(x, time, stage, condition, labels, lengths, modulations)

    def modulations(self, times: torch.Tensor, stage: int, labels: torch.Tensor) -> torch.Tensor:
        """See `StagedModel`."""
        return self.flow.modulations(times, stage, labels)
