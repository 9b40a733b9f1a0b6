"""The velocity network: one DiT trunk for all stages, conditioned on stage, time, class and optionally a token map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.attention import full_attention, within_stage_attention
from ecar_dist.models.layers import (
    ClassEmbedding,
    Linear,
    StageEmbedding,
    TimeEmbedding,
    ZeroLinear,
    patchify,
    position_table,
    unpatchify,
)
from ecar_dist.models.transformer import Transformer


class VelocityNetwork(nn.Module):
    """v(x_u, mt_k(u), k, M_k) of eq. (5). Exactly zero before training.

    condition_width: channels of the token maps M_k; None for a network without token maps.
    mean_velocity: gives average velocities over intervals (flow/mean_velocity.py), whose lengths are an extra input.
    Before training the lengths have no effect, so the weights of a velocity network can be used as initial weights.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        grid_sides: Sequence[int],
        token_channels: int,
        patch_size: int,
        num_classes: int,
        condition_width: int | None,
        mean_velocity: bool = False,
        recompute: bool,
    ) -> None:
        super().__init__()
        width = preset.flow_width
        ratio = preset.width_ratio(width)
        self.grid_sides = tuple(grid_sides)
        self.width = width
        self.patch_size = patch_size

        # Tokens: the state, and W_m for the token map.
        self.state_projection = Linear(token_channels, width)
        if condition_width is not None:
            self.condition_projection = Linear(condition_width, width, preset.width_ratio(condition_width))

        # What modulates all blocks: time, stage and class; the last row of the classes is the null label.
        self.time_embedding = TimeEmbedding(width, width_ratio=ratio)
        self.length_embedding = TimeEmbedding(width, zero=True, width_ratio=ratio) if mean_velocity else None
        self.stage_embedding = StageEmbedding(grid_sides, width)
        self.class_embedding = ClassEmbedding(num_classes, width)

        self.transformer = Transformer(
            preset.flow_depth, width, preset.flow_heads, preset.flow_adaln, recompute=recompute, width_ratio=ratio
        )
        self.output = ZeroLinear(width, token_channels, ratio)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        stage: int,
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, C, h, w], time [B], condition [B, T, D] or None, labels [B], lengths [B] -> float32 [B, C, h, w].

        modulations: [B, M], from `modulations` for this time. Then time, labels and lengths are ignored.
        """
        if modulations is None:
            (velocity,) = self._run([x], [time], [stage], condition, labels, None if lengths is None else [lengths])
            return velocity
        tokens = self._tokens([x], [stage], condition)
        attends = [full_attention] * len(self.transformer.blocks)
        outputs = self.output(self.transformer(tokens, None, attends, modulations=modulations[:, None])).float()
        return unpatchify(outputs, self.patch_size)

    def modulations(self, times: torch.Tensor, stage: int, labels: torch.Tensor) -> torch.Tensor:
        """Everything that calls of a stage at times [n] compute from time and labels [B] alone, [n, B, M].

        Computing it at once reads the weights of adaLN once per stage instead of once per call. They are a third of
        the trunk of DiT-XL.
        """
        conditioning = self._conditioning(
            times.expand(len(labels), -1).T.reshape(-1, 1), [stage], labels.repeat(len(times))
        )
        return self.transformer.modulations(conditioning[:, 0]).unflatten(0, (len(times), len(labels)))

    def all_stages(
        self,
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Training: the velocities of all stages in one pass, float32, K of [B, C, h_k, w_k].

        states: K of [B, C, h_k, w_k]; times and lengths: K of [B]; condition: [B, T_0 + .. + T_{K-1}, D] or None. One
        pass instead of K: larger matrix products, and each weight has one gradient.
        """
        return self._run(states, times, range(len(states)), condition, labels, lengths)

    def _run(
        self,
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        stages: Sequence[int],
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: Sequence[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        tokens = self._tokens(states, stages, condition)
        stacked = None if lengths is None else torch.stack(list(lengths), dim=1)
        conditioning = self._conditioning(torch.stack(list(times), dim=1), stages, labels, stacked)

        # Attention stays within the stage. The velocity is float32, like the ODE's state.
        segments = [self.grid_sides[stage] ** 2 for stage in stages]
        attends = [within_stage_attention(segments)] * len(self.transformer.blocks)
        outputs = self.output(self.transformer(tokens, conditioning, attends, segments)).float()
        return [unpatchify(part, self.patch_size) for part in outputs.split(segments, dim=1)]

    def _tokens(
        self, states: Sequence[torch.Tensor], stages: Sequence[int], condition: torch.Tensor | None
    ) -> torch.Tensor:
        """The patches of each state, with positions of its stage's own grid, plus the condition: [B, T, D]."""
        patches = [patchify(state, self.patch_size) for state in states]
        positions = [position_table(self.grid_sides[stage], self.width, states[0].device) for stage in stages]
        tokens = self.state_projection(_joined(patches, dim=1)) + _joined(positions, dim=0)
        return tokens if condition is None else tokens + condition

    def _conditioning(
        self, times: torch.Tensor, stages: Sequence[int], labels: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The vector that modulates all blocks, for each of S stages: times and lengths [B, S] -> [B, S, D]."""
        time = self.time_embedding(times.flatten())  # [B S, D]
        if self.length_embedding is not None:
            time = time + self.length_embedding((torch.zeros_like(times) if lengths is None else lengths).flatten())
        stage_index = torch.arange(stages[0], stages[0] + len(stages), device=labels.device)
        conditioning = time.unflatten(0, (-1, len(stages))) + self.stage_embedding(stage_index)
        return conditioning + self.class_embedding(labels)[:, None]


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]
