"""The seam between a stage-wise flow model and what trains and samples it: ECAR, the pyramid and DiT all fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class StagedModel(Protocol):
    """Velocities of all stages at once for training, and of one stage after the other for sampling.

    What a stage's velocity is conditioned on, beside its time and class, is the model's own affair: `begin_stage` makes
    it once a stage from the state that is fed back and the cache, and `velocity` is handed it at each solver call.
    """

    def __call__(
        self,
        contexts: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        labels: torch.Tensor,
    ) -> list[torch.Tensor]:
        """K of [B, C, h_k, w_k], float32; a model that is fed no states ignores the contexts."""

    def start_cache(self) -> Any:
        """What `begin_stage` remembers between stages; one for each batch that is sampled."""

    def begin_stage(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: Any
    ) -> torch.Tensor | None:
        """The condition of `stage`, [B, ...], or None for a model that has none; stages must come in order."""

    def velocity(
        self, x: torch.Tensor, time: torch.Tensor, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """dx/du at x [B, C, h, w] and model time [B]; float32 [B, C, h, w]."""
