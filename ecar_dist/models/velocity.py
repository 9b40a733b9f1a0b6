"""The velocity network: one DiT trunk for all stages, conditioned on stage, time and class, and maybe a token map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.attention import full_attention
from ecar_dist.models.layers import Embedding, Linear, TimeEmbedding, ZeroLinear, patchify, position_table, unpatchify
from ecar_dist.models.transformer import Transformer


class VelocityNetwork(nn.Module):
    """v(x_u, mt_k(u), k, M_k) of eq. (5). Exactly zero before training.

    condition_width: channels of the token maps M_k; None for a network without token maps.
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
        recompute: bool,
    ) -> None:
        super().__init__()
        width = preset.flow_width
        self.grid_sides = tuple(grid_sides)
        self.width = width
        self.patch_size = patch_size

        # Tokens: the state, and W_m for the token map.
        self.state_projection = Linear(token_channels, width)
        if condition_width is not None:
            self.condition_projection = Linear(condition_width, width)

        # What modulates all blocks: time, stage and class; the last row of the classes is the null label.
        self.time_embedding = TimeEmbedding(width)
        self.stage_embedding = Embedding(len(grid_sides), width)
        self.class_embedding = Embedding(num_classes + 1, width)

        self.transformer = Transformer(
            preset.flow_depth, width, preset.flow_heads, preset.flow_adaln, recompute=recompute
        )
        self.output = ZeroLinear(width, token_channels)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """x [B, C, h, w], time [B], condition [B, T, D] or None, labels [B] -> float32 [B, C, h, w]."""
        # Tokens: the patches of the state, with positions of the stage's own grid, plus the condition of the same grid.
        position = position_table(self.grid_sides[stage], self.width, x.device)
        tokens = self.state_projection(patchify(x, self.patch_size)) + position  # [B, T, D]
        if condition is not None:
            tokens = tokens + condition

        # The vector that modulates all blocks.
        stage_index = torch.full((1,), stage, device=x.device)
        conditioning = self.time_embedding(time) + self.stage_embedding(stage_index) + self.class_embedding(labels)

        # Attention stays within the stage. The velocity is float32, as the ODE's state.
        tokens = self.transformer(tokens, conditioning, [full_attention] * len(self.transformer.blocks))
        return unpatchify(self.output(tokens).float(), self.patch_size)
