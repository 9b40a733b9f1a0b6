"""`par` and `par_cont`: autoregression over tokens in region order, several of them at once.

The order, the markers and the groups are those of PAR (Wang et al., arXiv 2412.15119; flow/discrete/region_order.py);
n = 1 is plain autoregression. `par` draws codes of a codebook, as in the paper. `par_cont` is ours: the same
transformer, but each token is drawn by MAR's flow head. Both differ from the paper in two ways. A slot has the place
of the token that it predicts, as fixed and learned positions instead of rotations. The class modulates the transformer
(adaLN, one matrix for all blocks), in addition to being the first slot's input.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from ecar_dist.flow.discrete.region_order import group_sizes, inverse_order, region_order, slot_sources
from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.attention import KVCache, group_mask, grouped_attention
from ecar_dist.models.layers import (
    ClassEmbedding,
    Embedding,
    Linear,
    PositionEmbedding,
    ZeroLinear,
    position_table,
)
from ecar_dist.models.mar import FlowHead
from ecar_dist.models.tokens.codebook import Codebook
from ecar_dist.models.transformer import Transformer


class GroupedTransformer(nn.Module):
    """A vector for each token of the order, from the class and the tokens of earlier groups."""

    def __init__(self, size: TrunkSize, *, grid_side: int, group: int, num_classes: int, recompute: bool) -> None:
        super().__init__()
        num_tokens = grid_side**2
        self.group = group
        self.group_sizes = group_sizes(num_tokens, group)
        self.groups = tuple(number for number, count in enumerate(self.group_sizes) for _ in range(count))
        self.order = region_order(grid_side, group)
        self.sources = slot_sources(num_tokens, group)
        self.class_embedding = ClassEmbedding(num_classes, size.width)
        if group > 1:
            self.markers = Embedding(group - 1, size.width)
        self.positions = PositionEmbedding([grid_side], size.width)
        self.transformer = Transformer(size.depth, size.width, size.heads, adaln="shared", recompute=recompute)

    def forward(self, content: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Training: all slots in one pass. content [B, N, D] in drawing order, labels [B] -> float32 [B, N, D]."""
        classes = self.class_embedding(labels)
        slots = self._slots(content, classes, 0, len(self.order), first=0)
        attends = [grouped_attention(self.group_sizes)] * len(self.transformer.blocks)
        return self.transformer(slots, classes[:, None], attends)

    def next_slots(
        self, content: torch.Tensor, labels: torch.Tensor, start: int, stop: int, cache: KVCache
    ) -> torch.Tensor:
        """Sampling: slots start .. stop - 1, one group or more, float32 [B, stop - start, D].

        content: vectors of the tokens from `first_needed` up to, but without, the last of these groups, [B, .., D].
        The cache contains slots 0 .. start - 1; the call appends the new ones.
        """
        # One group sees itself and everything before it. Several need the rule of `grouped_attention`.
        mask = None
        if self.groups[start] != self.groups[stop - 1]:
            mask = group_mask(index_on(self.groups[:stop], labels.device))[start:]  # [stop - start, stop]

        classes = self.class_embedding(labels)
        slots = self._slots(content, classes, start, stop, first=self.first_needed(start))
        return self.transformer(slots, classes[:, None], cache.attends(mask))

    def first_needed(self, start: int) -> int:
        """The first token that is an input of slot `start` or of a later one."""
        return max(0, start - (1 if start <= self.group else self.group))

    def start_cache(self) -> KVCache:
        return KVCache(len(self.transformer.blocks))

    def _slots(
        self, content: torch.Tensor, classes: torch.Tensor, start: int, stop: int, *, first: int
    ) -> torch.Tensor:
        """Inputs of slots start .. stop - 1 with the places of the tokens that they predict, [B, stop - start, D].

        first: the token that `content` begins with.
        """
        # The class, the markers and the tokens as rows of one table, from which each slot takes its own.
        device = classes.device
        parts = [classes[:, None]]
        if self.group > 1:
            markers = self.markers(torch.arange(self.group - 1, device=device))
            parts.append(markers.expand(len(classes), -1, -1))
        table = torch.cat([*parts, content], dim=1)
        rows = index_on(self.sources, device)[start:stop]
        inputs = table[:, torch.where(rows < self.group, rows, rows - first)]

        # Positions, fixed and learned.
        places = index_on(self.order, device)[start:stop]
        fixed = position_table(math.isqrt(len(self.order)), table.shape[-1], device)[places]
        return inputs + fixed + self.positions(places)


class PAR(nn.Module):
    """Logits of the codes of tokens [B, N, c], c = C p^2.

    Arguments:
        size: depth, width and heads; `head_depth` is not used.
        group: n, the number of regions, and of tokens drawn at once.
        num_codes: V.
        latent_size: latent side; N = (latent_size / p)^2.
        latent_channels: C.
        patch_size: p.
        num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
        recompute: the backward pass recomputes each block instead of keeping its activations.
    """

    def __init__(
        self,
        size: TrunkSize,
        *,
        group: int,
        num_codes: int,
        latent_size: int,
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.codebook = Codebook(num_codes, latent_channels * patch_size**2)
        self.code_embedding = Embedding(num_codes, size.width)
        self.trunk = GroupedTransformer(
            size, grid_side=latent_size // patch_size, group=group, num_classes=num_classes, recompute=recompute
        )
        self.output = ZeroLinear(size.width, num_codes)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Training: (logits float32 [B, N, V], codes int64 [B, N]), both in drawing order.

        tokens: row by row, [B, N, c]; labels: int64 [B], num_classes is the null label.
        """
        codes = self.codebook(tokens)[:, index_on(self.trunk.order, tokens.device)]
        return self.output(self.trunk(self.code_embedding(codes), labels)).float(), codes

    def next_logits(
        self, codes: torch.Tensor, labels: torch.Tensor, start: int, stop: int, cache: KVCache
    ) -> torch.Tensor:
        """Sampling: logits of tokens start .. stop - 1 of the order, float32 [B, stop - start, V]; see `next_slots`.

        codes: those of all tokens before the last of these groups, in drawing order, int64 [B, ..].
        """
        content = self.code_embedding(codes[:, self.trunk.first_needed(start) :])
        return self.output(self.trunk.next_slots(content, labels, start, stop, cache)).float()

    def tokens_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, N] in drawing order -> tokens row by row, float32 [B, N, c]."""
        return self.codebook(codes[:, index_on(inverse_order(self.trunk.order), codes.device)])


class ContinuousPAR(nn.Module):
    """Velocities of tokens [B, N, c], c = C p^2, each conditioned on its slot's output; arguments as for `PAR`."""

    def __init__(
        self,
        size: TrunkSize,
        *,
        group: int,
        latent_size: int,
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = latent_channels * patch_size**2
        self.state_projection = Linear(channels, size.width)
        self.trunk = GroupedTransformer(
            size, grid_side=latent_size // patch_size, group=group, num_classes=num_classes, recompute=recompute
        )
        self.head = FlowHead(size.width, size.head_depth, channels)

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, times: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Training: velocities [B, R, N, c], float32, of R draws of every token. All tokens row by row.

        tokens [B, N, c]; states x_u [B, R, N, c]; times: model time [B, R, N]; labels int64 [B].
        """
        order = self.trunk.order
        content = self.state_projection(tokens[:, index_on(order, tokens.device)])
        conditions = self.head.condition_projection(self.trunk(content, labels))
        conditions = conditions[:, index_on(inverse_order(order), tokens.device)]
        return self.velocity(states, times, conditions[:, None])

    def next_conditions(
        self, tokens: torch.Tensor, labels: torch.Tensor, start: int, stop: int, cache: KVCache
    ) -> torch.Tensor:
        """Sampling: conditions of tokens start .. stop - 1 of the order, [B, stop - start, D]; see `next_slots`.

        tokens: the tokens before them, in drawing order, [B, start, c].
        """
        content = self.state_projection(tokens[:, self.trunk.first_needed(start) :])
        return self.head.condition_projection(self.trunk.next_slots(content, labels, start, stop, cache))

    def velocity(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """dx/du of tokens x [..., c] at model time [...]; float32. `condition` [..., D]."""
        return self.head(x, time, condition)


@functools.lru_cache(maxsize=64)  # otherwise each step would wait for a copy from the host
def index_on(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Fixed numbers as int64 [n] on a device."""
    with torch.inference_mode(False):  # numbers first made while sampling must also work in training
        return torch.tensor(values, device=device)
