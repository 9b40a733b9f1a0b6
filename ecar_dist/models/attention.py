"""Self-attention, and the rules for which token may attend to which.

All models of the family follow one rule on group ids, `allow(query, key) = group[query] >= group[key]`: the groups of
ECAR are its stages (docs/ecar.md, section 6), causal AR has one group per token, PAR has single tokens first and
then groups, and masked AR has one group. `Attention` leaves the rule to an `attend` function, so the mask-free form for
training, the masked reference and the cached form for sampling use the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ecar_dist.compiled_constants import constant_when_compiled
from ecar_dist.models.layers import Linear, RMSNorm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v, out: [B, heads, T, D / heads]


def group_mask(groups: torch.Tensor) -> torch.Tensor:
    """Which token may attend to which: int [T] -> bool [T, T], True = attend; query on the first axis."""
    return groups[:, None] >= groups[None, :]


def block_causal_mask(stage_tokens: Sequence[int]) -> torch.Tensor:
    """A token sees its own stage and the coarser ones: bool [T, T], T = sum(stage_tokens)."""
    # The group of a token is the number of its stage.
    return group_mask(torch.arange(len(stage_tokens)).repeat_interleave(torch.tensor(stage_tokens)))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A token sees itself and the tokens before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped_attention(group_sizes: Sequence[int]) -> Attend:
    """A token sees its own group and the groups before it. For many small groups, with one mask.

    Groups of single tokens are `causal_attention`, which keeps the fused kernels.
    """
    sizes = tuple(group_sizes)
    return causal_attention if max(sizes) == 1 else functools.partial(_grouped, sizes)


def _grouped(group_sizes: tuple[int, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_group_mask_on(group_sizes, q.device))


@constant_when_compiled
def _group_mask_on(group_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _group_mask_once(group_sizes, device)


@functools.lru_cache(maxsize=16)  # otherwise each layer would wait for a copy from the host
def _group_mask_once(group_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a mask first made while sampling must also work in training
        return block_causal_mask(group_sizes).to(device)


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every token sees every token."""
    return F.scaled_dot_product_attention(q, k, v)


def masked_attention(mask: torch.Tensor) -> Attend:
    """Attention under a boolean mask [T, T]: the reference that the faster forms are tested against."""
    return functools.partial(_masked, mask)


def _masked(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device))


def block_causal_attention(stage_tokens: Sequence[int]) -> Attend:
    """`masked_attention(block_causal_mask(...))` as one mask-free call per stage, which keeps the fused kernels."""
    return functools.partial(_by_stage, tuple(stage_tokens), True)


def within_stage_attention(stage_tokens: Sequence[int]) -> Attend:
    """The tokens of several stages side by side: a token sees only its own stage."""
    return functools.partial(_by_stage, tuple(stage_tokens), False) if len(stage_tokens) > 1 else full_attention


def _by_stage(
    stage_tokens: tuple[int, ...], sees_coarser: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    outputs = []
    end = 0
    for count in stage_tokens:
        # The queries of stage k against the keys of stages 0 .. k, which come first in the sequence; or of stage k.
        start, end = end, end + count
        first = 0 if sees_coarser else start
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]))
    return torch.cat(outputs, dim=2)


class KVCache:
    """Keys and values of all stages so far, for one batch: a pair of [B, heads, T, D / heads] in each layer."""

    def __init__(self, num_layers: int) -> None:
        self.num_stages = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def attends(self, mask: torch.Tensor | None = None) -> list[Attend]:
        """One function per layer: it appends the new keys and values, and attends to all of them, or as `mask` allows.

        mask: bool [new tokens, all tokens], True = attend.
        """
        return [functools.partial(self._attend, layer, mask) for layer in range(len(self._layers))]

    def keep(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens."""
        kept = (pair and (pair[0][:, :, :num_tokens], pair[1][:, :, :num_tokens]) for pair in self._layers)
        self._layers = list(kept)

    def _attend(
        self, layer: int, mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        cached = self._layers[layer]
        if cached is not None:
            k = torch.cat((cached[0], k), dim=2)
            v = torch.cat((cached[1], v), dim=2)
        self._layers[layer] = (k, v)
        # Without a mask, the new stage or group sees itself and everything before it.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int, width_ratio: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, width_ratio)
        # One gain per channel of a head, shared by all heads.
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)
        self.out = Linear(width, width, width_ratio)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        # One projection, split into queries, keys and values of every head.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        # Normalised queries and keys keep the logits bounded in bf16.
        heads_out = attend(self.query_norm(q), self.key_norm(k), v)
        return self.out(heads_out.transpose(1, 2).flatten(2))  # [B, T, D]
