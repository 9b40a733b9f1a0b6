"""What the background threads of a save do: each rank writes its share, then rank 0 commits. No collectives here."""

from __future__ import annotations

import dataclasses
import errno
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecar_dist.errors import CheckpointError, EcarError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.folder import CheckpointPlace, Draft
from ecar_dist.runtime.checkpoint.reader import value_problem
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, WrittenFile, write_tensor_file
from ecar_dist.runtime.engine import Fragment


class TakenOverError(CheckpointError):
    """Another attempt owns the place: this one must not write there any more."""


@dataclass(frozen=True)
class Share:
    """This rank's part of one save: host copies by kind, and the fragments in them that it writes."""

    file: str
    step: int
    fragments: Sequence[Fragment]
    copies: Mapping[str, Sequence[torch.Tensor]]
    stopping: threading.Event

    def write(self, draft: Draft, kinds: Sequence[str]) -> dict[str, Any]:
        """The manifest's entry of this rank's file. Raises CheckpointError, DataError or OSError."""
        entries = [self._entry(kind, fragment) for fragment in self.fragments for kind in kinds]

        def write(path: Path) -> WrittenFile:
            return write_tensor_file(path, entries, halfway=lambda: failpoint("checkpoint.write", self.step))

        written = draft.write(self.file, write)
        failpoint("checkpoint.written", self.step)
        held = [f"{fragment.name}:{fragment.start}:{fragment.numel}" for fragment in self.fragments]
        return {**dataclasses.asdict(written), "fragments": held}

    def _entry(self, kind: str, fragment: Fragment) -> TensorEntry:
        def make() -> torch.Tensor:
            if self.stopping.is_set():
                raise CheckpointError("the save was given up")
            value = fragment.of(self.copies[kind])
            if problem := value_problem(kind, value):  # no reader would take it
                raise CheckpointError(f"{kind} of {fragment.name} {problem}")
            return value

        return TensorEntry(f"{kind}:{fragment.name}:{fragment.start}", torch.float32, (fragment.numel,), make)


@dataclass(frozen=True)
class Outcome:
    """How a rank's part of a save ended; picklable. `full`: what failed was space."""

    files: tuple[dict[str, Any], ...] = ()  # one entry per draft
    error: str | None = None
    full: bool = False
    taken_over: bool = False


def outcome_of(write: Callable[[], Sequence[dict[str, Any]]], where: str) -> Outcome:
    """Run `write`, which writes to `where`; whatever it raises is said to the other ranks."""
    try:
        return Outcome(tuple(write()))
    except TakenOverError as error:
        return Outcome(error=str(error), taken_over=True)
    except EcarError as error:
        return Outcome(error=str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Outcome(error=f"cannot write {error.filename or where}: {error.strerror or error}", full=full)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


def commit(drafts: Sequence[tuple[Draft, bytes]], place: CheckpointPlace, still_ours: Callable[[], bool]) -> None:
    """Rank 0: give every draft its manifest, then publish them. Raises as `Share.write`, and TakenOverError."""
    for draft, manifest in drafts:
        draft.prepare(manifest)
    for draft, _ in drafts:
        if not still_ours():
            raise TakenOverError(f"another attempt has taken over {place.where}; this one ends, and leaves it alone")
        draft.publish()
