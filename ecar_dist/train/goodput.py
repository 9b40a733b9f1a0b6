"""Goodput: how much of a run's wall time became training."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any


class Goodput:
    """The share of the wall time since the run's first attempt that went into steps which count.

    That is forward, backward and optimizer of the steps that moved the weights and were not lost since. What was
    computed after the checkpoint to which a kill or a roll-back led back is lost, so the sum travels in the
    checkpoint's notes. Time between two attempts counts as lost, be it in a scheduler's queue.
    """

    def __init__(self, notes: Mapping[str, Any] | None = None) -> None:
        self.run_began: float | None = None  # seconds since the epoch; known to the rank that reports
        self._seen = 0.0  # productive seconds of this attempt, kept or not
        self.resume(notes or {})

    def notes(self) -> dict[str, float]:
        """What a checkpoint has to carry, as JSON values."""
        return {"kept_seconds": self._kept}

    def resume(self, notes: Mapping[str, Any]) -> None:
        """The run goes on from the checkpoint with these notes: steps made after it do not count."""
        self._kept = float(notes.get("kept_seconds", 0.0))

    def end_step(self, productive: float, applied: bool) -> None:
        """`productive`: seconds that this attempt has spent in productive phases so far."""
        self._kept += (productive - self._seen) if applied else 0.0
        self._seen = productive

    def values(self) -> dict[str, float]:
        if self.run_began is None:
            return {}
        return {"perf/goodput": min(1.0, self._kept / max(1e-9, time.time() - self.run_began))}


def began(attempts: Sequence[Mapping[str, Any]]) -> float:
    """When the first of a run's attempts (lineage.json) that says so began, in seconds since the epoch."""
    started = next((one["started"] for one in attempts if one.get("started")), None)
    return datetime.datetime.fromisoformat(started).timestamp() if started else time.time()
