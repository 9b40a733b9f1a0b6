"""bad_steps.jsonl in the run directory: which steps were bad, on which samples, and what is passed over since."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import sync_to_disk
from ecar_dist.train.bad_steps import Window, bad_step_record, roll_back_record, windows_in


class BadStepFile:
    """All methods are collective; rank 0 alone touches the file."""

    def __init__(self, path: Path, world: World) -> None:
        self._path, self._world = path, world

    def windows(self) -> list[Window]:
        """Of all roll-backs of the run so far."""
        found = self._world.on_first_rank(lambda: windows_in(self._lines()))
        return [(first, last) for first, last in self._world.broadcast(found)]

    def note_step(
        self, step: int, samples_seen: int, loss: float, grad_norm: float, reason: str, own_samples: Sequence[int]
    ) -> None:
        """A bad step with the samples of every rank, in the order in which each read them."""
        ids = self._world.gather(list(own_samples))
        self._append(bad_step_record(step, samples_seen, loss, grad_norm, reason, ids))

    def note_roll_back(self, step: int, window: Window) -> None:
        """On disk when this returns: a crash after it finds the window."""
        self._append(roll_back_record(step, window))

    def _append(self, line: str) -> None:
        self._world.on_first_rank(lambda: _append_synced(self._path, line))

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []


def _append_synced(path: Path, line: str) -> None:
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the last line of a process that was killed
    with open(path, "a") as file:
        file.write("\n" * torn + line)
        file.flush()
        os.fsync(file.fileno())
    sync_to_disk(path.parent)
