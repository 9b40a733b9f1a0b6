"""The AR transformer: token maps of all stages from the class and the coarser stages' states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from ecar_dist.flow.pyramid import upsample
from ecar_dist.kinds.presets import Preset
from ecar_dist.models.attention import (
    Attend,
    KVCache,
    block_causal_attention,
    block_causal_mask,
    masked_attention,
)
from ecar_dist.models.layers import (
    ClassEmbedding,
    Linear,
    PositionEmbedding,
    StageEmbedding,
    patchify,
    position_table,
)
from ecar_dist.models.transformer import Transformer


class TokenMapTransformer(nn.Module):
    """M_0 .. M_{K-1} from a sequence of K blocks, one per stage; section 6 of docs/ecar.md.

    The input of block k is C_{k-1} upsampled to the grid of stage k, eq. (16); it attends to blocks 0 .. k. The input
    of block 0, and of every block if `feeds_state` is False, is the class embedding plus learned positions.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        grid_sides: Sequence[int],
        token_channels: int,
        patch_size: int,
        num_classes: int,
        context_scales: Sequence[float],
        feeds_state: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        width = preset.ar_width
        num_stages = len(grid_sides)
        self.width = width
        self.patch_size = patch_size
        self.context_scales = tuple(context_scales)
        self.feeds_state = feeds_state

        # Where the tokens of each stage are in the sequence.
        self.grid_sides = tuple(grid_sides)
        self.stage_tokens = tuple(side**2 for side in grid_sides)
        self.stage_starts = (0, *accumulate(self.stage_tokens))

        # Inputs: class, stage, learned positions of the blocks without a context, and W_in of eq. (16).
        self.class_embedding = ClassEmbedding(num_classes, width)
        self.stage_embedding = StageEmbedding(grid_sides, width)
        self.start_positions = PositionEmbedding(grid_sides[:1] if feeds_state else grid_sides, width)
        if feeds_state and num_stages > 1:
            self.context_projection = Linear(token_channels, width)
        # Trunk, and the positions that tell the tokens of a map apart.
        self.transformer = Transformer(
            preset.ar_depth,
            width,
            preset.ar_heads,
            adaln="shared",
            recompute=recompute,
            width_ratio=preset.width_ratio(width),
        )
        self.output_positions = PositionEmbedding(grid_sides, width)

    def forward(self, contexts: Sequence[torch.Tensor], labels: torch.Tensor, *, masked: bool) -> torch.Tensor:
        """Training: M_0 .. M_{K-1} side by side, [B, T_0 + .. + T_{K-1}, D], in one pass.

        contexts: C_0 .. C_{K-2}, [B, C, h_k, w_k]. `masked` selects the reference attention, not the mask-free one.
        """
        if masked:
            attend = masked_attention(block_causal_mask(self.stage_tokens))
        else:
            attend = block_causal_attention(self.stage_tokens)

        # The blocks side by side: [B, T_0 + .. + T_{K-1}, D].
        classes = self.class_embedding(labels)  # [B, D]
        sources = [None, *contexts] if self.feeds_state else [None] * len(self.grid_sides)
        inputs = [self._stage_input(stage, source, classes) for stage, source in enumerate(sources)]

        # One pass under the block-causal rule.
        return self._run(torch.cat(inputs, dim=1), classes, [attend] * self.depth, start=0)

    def next_stage(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Sampling: M_k of one stage, [B, T_k, D], from C_{k-1} and the keys and values of earlier stages.

        The call appends this stage's keys and values to the cache.
        """
        assert cache.num_stages == stage, f"the cache holds {cache.num_stages} stages, stage {stage} needs {stage}"
        cache.num_stages += 1

        # The same input as in `forward`; the order of the calls enforces the block-causal rule.
        classes = self.class_embedding(labels)  # [B, D]
        tokens = self._stage_input(stage, context, classes)
        return self._run(tokens, classes, cache.attends(), start=self.stage_starts[stage])

    @property
    def depth(self) -> int:
        return len(self.transformer.blocks)

    def _stage_input(self, stage: int, context: torch.Tensor | None, classes: torch.Tensor) -> torch.Tensor:
        """inp_k of eq. (16) with positions and stage, [B, T_k, D]."""
        device = classes.device

        # Content: the class, or the previous stage's state at unit variance on this stage's grid.
        if stage == 0 or not self.feeds_state:
            start = self.stage_starts[stage]
            tokens = classes[:, None] + self.start_positions(_range(start, self.stage_tokens[stage], device))
        else:
            assert context is not None, f"stage {stage} needs the state of stage {stage - 1}"
            scaled = self.context_scales[stage - 1] * context
            tokens = self.context_projection(patchify(upsample(scaled), self.patch_size))

        # Position within the stage, and the stage itself.
        position = position_table(self.grid_sides[stage], self.width, device)  # [T_k, D]
        return tokens + position + self.stage_embedding(_range(stage, 1, device))

    def _run(self, tokens: torch.Tensor, classes: torch.Tensor, attends: Sequence[Attend], start: int) -> torch.Tensor:
        positions = self.output_positions(_range(start, tokens.shape[1], tokens.device))  # [T, D]
        return self.transformer(tokens, classes[:, None], attends) + positions


def _range(start: int, count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, start + count, device=device)
