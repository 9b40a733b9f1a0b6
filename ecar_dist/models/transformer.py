"""The pre-norm adaLN transformer that both networks are made of (the DiT block, Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecar_dist.kinds.presets import AdaLNKind
from ecar_dist.models.attention import Attend, Attention
from ecar_dist.models.layers import MLP, AdaLN, AdaLNOffset, gated, modulated_norm


class Block(nn.Module):
    """Attention and MLP, each after a modulated norm and before a gate. Gates start at zero: the block is the identity.

    modulation: maps the transformer's conditioning to the block's six vectors, [B, S, 6 D].
    """

    def __init__(self, width: int, heads: int, modulation: nn.Module, width_ratio: float = 1.0) -> None:
        super().__init__()
        self.modulation = modulation
        self.attention = Attention(width, heads, width_ratio)
        self.mlp = MLP(width, width_ratio)

    def forward(
        self,
        x: torch.Tensor,
        conditioning: torch.Tensor | None,
        attend: Attend,
        segments: Sequence[int] = (),
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, T, D], conditioning [B, S, ..] -> [B, T, D]; see `Transformer` for the segments.

        modulation: adaLN's output for the conditioning, [B, S, 6 D], if it is already known.
        """
        # adaLN-Zero: shift, scale and gate of both branches.
        parts = (self.modulation(conditioning) if modulation is None else modulation).chunk(6, dim=-1)  # each [B, S, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts

        # Residual branches.
        attended = self.attention(modulated_norm(x, shift_attention, scale_attention, segments), attend)
        x = x + gated(attended, gate_attention, segments)
        return x + gated(self.mlp(modulated_norm(x, shift_mlp, scale_mlp, segments)), gate_mlp, segments)


class Transformer(nn.Module):
    """`depth` blocks, then a modulated norm. adaLN is a matrix per block, or one for all blocks plus offsets.

    recompute: keep only the input of each block, and recompute the rest in the backward pass (Chen et al., "Training
        deep nets with sublinear memory cost", arXiv 1604.06174). The results are the same, bit for bit.
    width_ratio: of all projections; see `Linear`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        adaln: AdaLNKind,
        recompute: bool = False,
        width_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.recompute = recompute

        # Modulation: each block has its own matrix, or all share one and each has an offset.
        shared = adaln == "shared"
        self.shared_modulation: nn.Module = AdaLN(width, 6, width_ratio) if shared else nn.Identity()
        modulations = (AdaLNOffset(6 * width) if shared else AdaLN(width, 6, width_ratio) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads, modulation, width_ratio) for modulation in modulations)
        self.head_modulation = AdaLN(width, 2, width_ratio)

    def forward(
        self,
        x: torch.Tensor,
        conditioning: torch.Tensor | None,
        attends: Sequence[Attend],
        segments: Sequence[int] = (),
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, T, D], conditioning [B, S, D], one attention rule per block -> float32 [B, T, D].

        The tokens are S segments that differ in their conditioning. `segments` are their lengths; omitted if S = 1.
        modulations: those of this conditioning, [B, S, M]. The conditioning itself is then not needed.
        """
        if modulations is not None:
            *blocks, head = modulations.split([6 * x.shape[-1]] * len(self.blocks) + [2 * x.shape[-1]], dim=-1)
            for block, modulation, attend in zip(self.blocks, blocks, attends, strict=True):
                x = block(x, None, attend, segments, modulation)
            shift, scale = head.chunk(2, dim=-1)  # each [B, S, D]
            return modulated_norm(x, shift, scale, segments)

        # Blocks. The shared matrix, if there is one, is applied once.
        for_blocks = self.shared_modulation(conditioning)
        for block, attend in zip(self.blocks, attends, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random, so no generator state has to be restored.
                x = checkpoint(block, x, for_blocks, attend, segments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, for_blocks, attend, segments)

        # Head norm.
        shift, scale = self.head_modulation(conditioning).chunk(2, dim=-1)  # each [B, S, D]
        return modulated_norm(x, shift, scale, segments)

    def modulations(self, conditioning: torch.Tensor) -> torch.Tensor:
        """adaLN's outputs for conditionings [..., D] in all blocks and in the head, side by side: [..., M].

        M = (6 depth + 2) D. They depend on no token, so sampling computes them for many calls at once.
        """
        for_blocks = self.shared_modulation(conditioning)
        blocks = [block.modulation(for_blocks) for block in self.blocks]  # type: ignore[operator]
        return torch.cat([*blocks, self.head_modulation(conditioning)], dim=-1)
