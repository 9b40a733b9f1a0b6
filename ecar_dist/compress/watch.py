"""A model that tracks where the sampler is while it draws, and what its layers see there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TIME_BINS = 8  # of model time, which runs from 0 to 1 over all stages


@dataclass(frozen=True)
class Place:
    """Where the sampler is. time: model time of a velocity call, None outside of one. null: bool [B], or None."""

    stage: int = 0
    time: float | None = None
    null: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """`stage1/maps`, or `stage1/time5` in the sixth of TIME_BINS equal parts of the time."""
        if self.time is None:
            return f"stage{self.stage}/maps"
        return f"stage{self.stage}/time{min(TIME_BINS - 1, int(self.time * TIME_BINS))}"


class WatchedModel:
    """A model for `generate`. It behaves like the given model, and tracks the `place` of the current call.

    calls: arguments and results of the velocity calls, if `keeps_calls`.
    """

    def __init__(self, model: nn.Module, null_label: int, *, keeps_calls: bool = False) -> None:
        self._model: Any = model
        self._null_label = null_label
        self._keeps_calls = keeps_calls
        self.calls: list[tuple[tuple[Any, ...], torch.Tensor]] = []
        self.place = Place()

    def __getattr__(self, name: str) -> Any:
        # Hidden from the sampler, so that each call computes its modulations itself.
        if name == "modulations":
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._model(*arguments)

    def begin_stage(
        self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: Any
    ) -> torch.Tensor | None:
        """See `StagedModel`."""
        with self._at(Place(stage, None, labels == self._null_label)):
            return self._model.begin_stage(stage, context, labels, cache)

    def velocity(
        self, x: torch.Tensor, time: torch.Tensor, *rest: Any, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `StagedModel`; `mar` passes only a condition as the rest."""
        rest = rest if lengths is None else (*rest, lengths)
        staged = bool(rest) and isinstance(rest[0], int)
        stage = rest[0] if staged else 0
        null = rest[2] == self._null_label if staged else None
        with self._at(Place(stage, float(time.flatten()[0]), null)):
            velocity = self._model.velocity(x, time, *rest)
        if self._keeps_calls:
            self.calls.append(((x, time, *rest), velocity.float()))
        return velocity

    @contextlib.contextmanager
    def _at(self, place: Place) -> Iterator[None]:
        self.place = place
        try:
            yield
        finally:
            self.place = Place()


@contextlib.contextmanager
def inputs_seen(layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with every input of the layers, for as long as the block runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda module, inputs: see(name, inputs[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
