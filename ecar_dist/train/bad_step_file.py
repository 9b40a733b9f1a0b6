"""bad_steps.jsonl in the run directory: which steps were bad, on which samples, and what is passed over since.

The lines of bad steps are a log, those of roll-backs are state: a window that is lost is learnt from once more, and
rolled back once more where it is still bad. Neither ends a run: a checkpoint's notes have every window that was known
when it was made, so damage can only cost those that came after it, and is said.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ecar_dist.command_line import counted
from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import set_aside, sync_to_disk
from ecar_dist.storage.untrusted import UntrustedError, open_plain_file
from ecar_dist.train.bad_steps import Window, bad_step_record, roll_back_record, window_in

MAX_FILE_BYTES = 1 << 33
MAX_LINE_BYTES = 1 << 24  # the samples of a global batch of a million
_COST = "a roll-back noted there since the checkpoint may be made again"


class BadStepFile:
    """All methods are collective; rank 0 alone touches the file."""

    def __init__(self, path: Path, world: World) -> None:
        self._path, self._world = path, world

    def windows(self) -> list[Window]:
        """Of all roll-backs of the run so far, as far as the file can be read; what cannot be is said."""
        found = self._world.on_first_rank(lambda: _windows(self._path))
        return [(first, last) for first, last in self._world.broadcast(found)]

    def note_step(
        self, step: int, samples_seen: int, loss: float, grad_norm: float, reason: str, own_samples: Sequence[int]
    ) -> None:
        """A bad step with the samples of every rank, in the order in which each read them.

        A disk that does not take the line does not end the run.
        """
        ids = self._world.gather(list(own_samples))
        line = bad_step_record(step, samples_seen, loss, grad_norm, reason, ids)
        self._world.on_first_rank(lambda: _append_or_say(self._path, line))

    def note_roll_back(self, step: int, window: Window) -> None:
        """On disk when this returns: a crash after it finds the window. Raises OSError, on all ranks."""
        line = roll_back_record(step, window)
        self._world.on_first_rank(lambda: _append_synced(self._path, line))


def _windows(path: Path) -> list[Window]:
    try:
        windows, damaged = _read(path)
    except FileNotFoundError:
        return []
    except (UntrustedError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        aside = set_aside(path)
        print(f"warning: {path} cannot be read ({reason}): it is now {aside.name}; {_COST}", file=sys.stderr)
        return []
    if damaged:
        print(f"warning: {path} has {counted(damaged, 'damaged line')}; {_COST}", file=sys.stderr)
    return windows


def _read(path: Path) -> tuple[list[Window], int]:
    """The windows, and the number of damaged lines but for a last one that was cut by a kill, and never acted on."""
    windows, damaged = [], 0
    with open_plain_file(path, MAX_FILE_BYTES) as file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                window = window_in(line)
            except UntrustedError:
                damaged += b"}" in line or line.endswith(b"\n")  # a cut line lacks both
                continue
            if window is not None:
                windows.append(window)
    return windows, damaged


def _append_or_say(path: Path, line: str) -> None:
    try:
        _append_synced(path, line)
    except OSError as error:
        print(f"warning: {path} does not take a line ({error.strerror}); training goes on", file=sys.stderr)


def _append_synced(path: Path, line: str) -> None:
    with open(path, "ab+") as file:
        # the last line of a process that was killed may be torn
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode())
        file.flush()
        os.fsync(file.fileno())
    sync_to_disk(path.parent)
