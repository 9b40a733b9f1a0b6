"""Where the time of a rank goes: the phases of a step, and a clock for the forward pass alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ecar_dist.runtime.watchdog.heartbeat import PHASES


class Phases:
    """The phase this rank is in, and the seconds it has spent in each so far.

    It is the host that is measured. Under a GPU the host runs ahead of the device, and the wait for the device lands in
    the phase that first needs a number from it: the backward one, where all ranks sum the loss. No synchronisation is
    added for the sake of the measurement.
    """

    def __init__(self, beat: Callable[[str, int], None], clock: Callable[[], float] = time.perf_counter) -> None:
        """`beat(phase, step)` is told of every change, the first phase among them."""
        self._beat, self._clock = beat, clock
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._name, self._since = next(iter(PHASES)), clock()
        beat(self._name, 0)

    def enter(self, name: str, step: int) -> None:
        """From here on the time counts for `name`, until the next call. About a microsecond, plus the beat."""
        now = self._clock()
        self._totals[self._name] += now - self._since
        self._totals[name] += 0.0  # a misspelt name fails here, not at the next change
        self._name, self._since = name, now
        self._beat(name, step)

    def totals(self) -> dict[str, float]:
        """Seconds in each phase up to now, the present one included: together they are the age of this object."""
        totals = dict(self._totals)
        totals[self._name] += self._clock() - self._since
        return totals


class ForwardClock:
    """Seconds between entering and leaving `with`: of the device where it is a GPU, else of the host.

    On a GPU two events are put into the stream and read when `take` is called; the host never waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds, self._began = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            self._events.append((_recorded(), None))
        else:
            self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._events[-1] = (self._events[-1][0], _recorded())
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds since the last call. Call it where the device is done with what was measured."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def _recorded() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
