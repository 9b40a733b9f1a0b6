"""What training and sampling require of a network with a velocity in each stage; ECAR and Pyramid provide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class StagedModel(Protocol):
    """Velocities of all stages at once for training, and of one stage after another for sampling.

    A model decides for itself what conditions a stage's velocity besides time and class. `begin_stage` computes that
    condition once per stage, from the fed-back state and the cache, and each solver call passes it to `velocity`.
    """

    def __call__(
        self,
        contexts: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        labels: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Training: K of [B, C, h_k, w_k], float32. A model that is fed no states ignores the contexts."""

    def start_cache(self) -> Any:
        """Sampling: what `begin_stage` keeps between stages; a new one for each batch."""

    def begin_stage(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: Any
    ) -> torch.Tensor | None:
        """Sampling: the condition of `stage`, [B, ...], or None for a model without one. Stages come in order."""

    def velocity(
        self, x: torch.Tensor, time: torch.Tensor, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """dx/du at x [B, C, h, w] and model time [B]; float32 [B, C, h, w]."""


class ModulatedModel(StagedModel, Protocol):
    """A model that can compute what its calls need from time and class ahead of the state, for many calls at once."""

    def modulations(self, times: torch.Tensor, stage: int, labels: torch.Tensor) -> torch.Tensor:
        """The modulations of calls at model times [n] with labels [B]: [n, B, M]."""

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
        """As in `MeanVelocityModel`; modulations: the row for this time, [B, M]."""


class MeanVelocityModel(StagedModel, Protocol):
    """A model that can also give average velocities over intervals (flow/mean_velocity.py).

    It receives their lengths, in the stage's time; None means a length of 0, which gives the velocity.
    """

    def conditions(self, contexts: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor | None:
        """The conditions of all stages side by side, [B, T_0 + .. + T_{K-1}, D]; None for a model without one."""

    def all_velocities(
        self,
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """What calling the model returns, from the `conditions` and the lengths, K of [B]."""

    def velocity(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        stage: int,
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in `StagedModel`; lengths [B]."""
