"""Token merging in the blocks of the velocity network while a stage is sampled (`sample.merge_ratio`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ecar_dist.flow.token_merging import Merging, match_tokens
from ecar_dist.models.layers import patchify
from ecar_dist.models.transformer import Block, Transformer


class TokenMerger:
    """Merges tokens before the attention and the MLP of every block of a transformer, and unmerges them after each.

    The residual stream keeps all tokens. Nothing is merged until `learn` has been called.
    """

    def __init__(self, transformer: Transformer, ratio: float) -> None:
        self._transformer = transformer
        self._ratio = ratio
        self._importance: torch.Tensor | None = None  # [B, T]
        self._merging: Merging | None = None

    def learn(self, conditional: torch.Tensor, null: torch.Tensor, patch_size: int) -> None:
        """Sets the importance of the tokens from both velocities [B, C, h, w]."""
        self._importance = patchify((conditional - null).float(), patch_size).norm(dim=-1)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: merge tokens in all calls of the transformer inside the `with` block."""
        if self._importance is None:
            yield
            return
        branches = [
            branch
            for block in self._transformer.blocks
            if isinstance(block, Block)
            for branch in (block.attention, block.mlp)
        ]
        handles = [self._transformer.register_forward_pre_hook(self._match)]
        handles += [branch.register_forward_pre_hook(self._before) for branch in branches]
        handles += [branch.register_forward_hook(self._after) for branch in branches]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _match(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Both halves of a guided batch use the importance of their image.
        tokens = inputs[0]
        assert self._importance is not None
        importance = self._importance.repeat(len(tokens) // len(self._importance), 1)
        self._merging = match_tokens(tokens, importance, self._ratio)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._merging is not None
        return self._merging.merge(inputs[0]), *inputs[1:]

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        assert self._merging is not None
        return self._merging.unmerge(output)
