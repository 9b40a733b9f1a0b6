"""The pre-norm adaLN transformer that both networks are made of (block of DiT, Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecar_dist.kinds.presets import AdaLNKind
from ecar_dist.models.attention import Attend, Attention
from ecar_dist.models.layers import MLP, AdaLN, AdaLNOffset, modulated_norm


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate; gates start at zero, so the block starts as identity.

    `modulation` maps what the transformer hands to its blocks onto six vectors, [B, 6 D].
    """

    def __init__(self, width: int, heads: int, modulation: nn.Module) -> None:
        super().__init__()
        self.modulation = modulation
        self.attention = Attention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, attend: Attend) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        parts = self.modulation(conditioning)[:, None].chunk(6, dim=-1)  # each [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attention * self.attention(modulated_norm(x, shift_attention, scale_attention), attend)
        return x + gate_mlp * self.mlp(modulated_norm(x, shift_mlp, scale_mlp))


class Transformer(nn.Module):
    """`depth` blocks, then a modulated norm. adaLN is a matrix per block, or one for all blocks plus offsets.

    With `recompute` the backward pass computes each block anew from its input, and nothing else of it is kept till then
    (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174): the same numbers, bit for bit.
    """

    def __init__(self, depth: int, width: int, heads: int, adaln: AdaLNKind, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        shared = adaln == "shared"
        self.shared_modulation: nn.Module = AdaLN(width, 6) if shared else nn.Identity()
        modulations = (AdaLNOffset(6 * width) if shared else AdaLN(width, 6) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads, modulation) for modulation in modulations)
        self.head_modulation = AdaLN(width, 2)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, attends: Sequence[Attend]) -> torch.Tensor:
        """x [B, T, D], conditioning [B, D], one attention rule a block -> float32 [B, T, D]."""
        for_blocks = self.shared_modulation(conditioning)
        for block, attend in zip(self.blocks, attends, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator to put back.
                x = checkpoint(block, x, for_blocks, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, for_blocks, attend)
        shift, scale = self.head_modulation(conditioning)[:, None].chunk(2, dim=-1)  # each [B, 1, D]
        return modulated_norm(x, shift, scale)
