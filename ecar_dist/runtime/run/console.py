"""A copy of what a rank prints, in the run directory: logs/console-ATTEMPT.log. In a Slurm job srun writes it instead.

Code for a single process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

from ecar_dist.runtime.placement import job_logs

HELD_CHARACTERS = 1 << 20  # kept at most, before the run directory is open


class ConsoleLog:
    """Copies standard output and standard error from now on, until the process ends.

    Text that is printed before `open` is kept, and written by it. A disk error ends only the copy.
    """

    def __init__(self) -> None:
        self._held: list[str] = []
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._ended = job_logs() is not None
        if not self._ended:
            sys.stdout = _Copied(sys.stdout, self)
            sys.stderr = _Copied(sys.stderr, self)

    def open(self, logs: Path, attempt: str, rank: int) -> None:
        """Write to the folder `logs` from now on. Ranks other than the first get a file once they print something."""
        self._path = logs / (f"console-{attempt}.log" if rank == 0 else f"console-{attempt}.rank-{rank:05d}.log")
        held = "".join(self._held)
        self._held = []
        if held:
            self.add(held)

    def add(self, text: str) -> None:
        """Add a piece of printed text."""
        if self._ended or not text:
            return
        if self._path is None:
            self._held.append(text)
            self._ended = sum(map(len, self._held)) > HELD_CHARACTERS
            return
        try:
            self._file = self._file or self._path.open("a", encoding="utf-8", errors="replace", buffering=1)
            self._file.write(text)
        except (OSError, ValueError):
            self._ended = True


class _Copied:
    """A text stream whose text also goes to the log."""

    def __init__(self, stream: Any, log: ConsoleLog) -> None:
        self._stream = stream
        self._log = log

    def write(self, text: str) -> int:
        self._log.add(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
