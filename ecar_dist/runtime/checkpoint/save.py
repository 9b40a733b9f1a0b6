"""The steps of a save outside of the collectives: copy a rank's state, write its file, commit the checkpoint.

    1. `HostSnapshot.take`    every rank copies its state to host memory; training waits only for this step
    2. `RankShare.write`      a thread of every rank writes its file
    3. `commit`               a thread of rank 0 writes the manifest and makes the checkpoint visible

`CheckpointStore` runs these steps, and makes all ranks agree on the result of each.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecar_dist.errors import CheckpointError, EcarError, reason_of
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.manifest import EVEN_SCHEMA, PARTS_SCHEMA, SCHEMA, Piece, Progress, even_pieces
from ecar_dist.runtime.checkpoint.reader import MASTER, value_problem
from ecar_dist.runtime.checkpoint.storage import PendingCheckpoint
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, WrittenFile, write_tensor_file
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine, Fragment
from ecar_dist.runtime.optimizer import ADAM_MOMENTS
from ecar_dist.storage.atomic import DISK_FULL

Partitions = Sequence[torch.Tensor]  # flat, fp32


def state_by_kind(engine: Engine, ema: ShardedEma) -> dict[str, Partitions]:
    """This rank's state as a checkpoint stores it: for each kind, flat partitions of one common layout."""
    return {MASTER: engine.partitions, **{name: engine.moments(name) for name in ADAM_MOMENTS}, **ema.by_kind}


class HostSnapshot:
    """Buffers in host memory for a copy of this rank's state.

    They are allocated once and reused by every save. They are pinned if the state is on a GPU. A save must end before
    the next one takes its copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}  # by kind and number of the partition

    def reserve(self, state: Mapping[str, Partitions], partitions: Collection[int]) -> None:
        """Allocate and touch the memory for `take`, before the first save needs it."""
        for kind, tensors in state.items():
            for index in partitions:
                self._buffer(kind, index, tensors[index])

    @torch.no_grad()
    def take(self, state: Mapping[str, Partitions], partitions: Collection[int]) -> dict[str, list[torch.Tensor]]:
        """Copy the given partitions of every kind; the others stay empty. Waits only for these copies."""
        # Start all copies before waiting for any of them.
        copies: dict[str, list[torch.Tensor]] = {}
        devices = set()
        for kind, tensors in state.items():
            copies[kind] = [torch.empty(0)] * len(tensors)
            for index in partitions:
                buffer = self._buffer(kind, index, tensors[index])
                buffer.copy_(tensors[index].detach().view(-1), non_blocking=True)
                copies[kind][index] = buffer
                devices.add(tensors[index].device)

        # Asynchronous copies run on the current stream.
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def _buffer(self, kind: str, index: int, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((kind, index))
        if buffer is None or buffer.numel() != like.numel():
            pinned = like.device.type == "cuda"
            # `zero_` touches every page now, not in the first save.
            buffer = torch.empty(like.numel(), dtype=torch.float32, pin_memory=pinned).zero_()
            self._buffers[kind, index] = buffer
        return buffer


@dataclass
class Target:
    """One pending checkpoint of a save, and the kinds of state in it."""

    pending: PendingCheckpoint
    kinds: tuple[str, ...]
    files: list[dict[str, Any]] = field(default_factory=list)  # manifest entries by rank, once all have written


@dataclass(frozen=True)
class RankShare:
    """What this rank writes in one save: fragments of the copies in host memory."""

    file: str
    step: int
    fragments: Sequence[Fragment]
    copies: Mapping[str, Partitions]
    stopping: threading.Event
    even: tuple[int, int] | None = None  # (k, n): the fragments are share k of n of every parameter

    def write(self, target: Target) -> dict[str, Any]:
        """Write this rank's file and return its manifest entry. Raises CheckpointError, DataError or OSError."""
        # Tensors are created when the file needs them, so no memory is needed beyond the copies.
        entries = [self._entry(kind, fragment) for fragment in self.fragments for kind in target.kinds]

        def write(path: Path) -> WrittenFile:
            return write_tensor_file(
                path,
                entries,
                halfway=lambda: failpoint("checkpoint.write", self.step),
                part_bytes=target.pending.part_bytes,
            )

        # The storage chooses the path: on the final disk for a folder, on a local disk for a bucket.
        written = target.pending.write_file(self.file, write)
        failpoint("checkpoint.written", self.step)

        # Fragments that follow from a rule are not listed: on thousands of ranks there are millions of them.
        entry = {key: value for key, value in dataclasses.asdict(written).items() if value is not None}
        if self.even is not None:
            return {**entry, "share": self.even}
        return {**entry, "fragments": list(map(_text_of, self.fragments))}

    def _entry(self, kind: str, fragment: Fragment) -> TensorEntry:
        def make() -> torch.Tensor:
            # When a run ends, it does not wait for the rest of the file.
            if self.stopping.is_set():
                raise CheckpointError("the run ended during the save")
            value = fragment.of(self.copies[kind])

            # Training cannot resume from such values, so they must not replace a good checkpoint.
            if problem := value_problem(kind, value):
                raise CheckpointError(f"{kind} of {fragment.name} {problem}")
            return value

        return TensorEntry(f"{kind}:{fragment.name}:{fragment.start}", torch.float32, (fragment.numel,), make)


def even_share(engine: Engine, rank: int, ranks: int) -> tuple[int, int] | None:
    """(rank, ranks) under ZeRO 3, where the fragments are an equal share of every parameter; else None."""
    found = {(fragment.name, fragment.start, fragment.numel) for fragment in engine.fragments}
    even = engine.zero_stage == 3 and found == set(even_pieces(engine.shapes, rank, ranks))
    return (rank, ranks) if even else None


def _text_of(fragment: Fragment | Piece) -> str:
    return f"{fragment.name}:{fragment.start}:{fragment.numel}"


def _with_files(manifest: Mapping[str, Any], files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest with its schema and the files of all ranks. Either all of these files have shares, or none has."""
    in_parts = any("parts" in file for file in files)
    if all("share" in file for file in files):
        return {**manifest, "schema": PARTS_SCHEMA if in_parts else EVEN_SCHEMA, "files": files}

    # Some rank has other fragments, so all ranks list theirs.
    listed = []
    for file in files:
        kept = {key: value for key, value in file.items() if key != "share"}
        if "share" in file:
            kept["fragments"] = list(map(_text_of, even_pieces(manifest["shapes"], *file["share"])))
        listed.append(kept)
    return {**manifest, "schema": PARTS_SCHEMA if in_parts else SCHEMA, "files": listed}


class TakenOverError(CheckpointError):
    """Another attempt at the run owns the storage now. This one must not write there any more."""


def commit(targets: Sequence[Target], manifest: Mapping[str, Any], still_ours: Callable[[], bool], where: str) -> None:
    """Rank 0, once all ranks have written: write the manifests, then make the checkpoints visible.

    manifest: the keys that all targets share, without schema and files. still_ours: False if another attempt has taken
    over.

    Raises CheckpointError, DataError or OSError if the storage rejects a manifest, and TakenOverError.
    """
    # Everything that can fail for lack of space comes first. Readers see none of it.
    for target in targets:
        text = json.dumps(_with_files(manifest, target.files))
        target.pending.write_manifest(text.encode())

    # Check ownership as late as possible. The commit is atomic in the storage.
    for target in targets:
        if not still_ours():
            raise TakenOverError(f"another attempt has taken over {where}; this one ends and changes nothing there")
        target.pending.commit()


@dataclass(frozen=True)
class Outcome:
    """How one rank's step of a save ended. Picklable, because rank 0 gathers it."""

    files: tuple[dict[str, Any], ...] = ()  # this rank's manifest entry for each target
    error: str | None = None
    disk_full: bool = False
    taken_over: bool = False


def outcome_of(step: Callable[[], Sequence[dict[str, Any]]], where: str) -> Outcome:
    """Run one step of a save, in a thread, and report any error as a value. where: the storage, for messages."""
    try:
        return Outcome(tuple(step()))
    except TakenOverError as error:
        return Outcome(error=str(error), taken_over=True)
    except EcarError as error:
        return Outcome(error=str(error))
    # A full disk is the most frequent failure, so its message says how much space is missing.
    except OSError as error:
        return Outcome(
            error=f"cannot write {error.filename or where}: {reason_of(error)}", disk_full=error.errno in DISK_FULL
        )
    # A bug that strikes one rank must reach all ranks, or they would wait for that rank.
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Verdict:
    """What all ranks know about a step of a save: the first rank that failed and why, or the bytes of all files."""

    failed: int | None = None
    outcome: Outcome = Outcome()  # of that rank
    bytes: int = 0


@dataclass
class Save:
    """A save that is under way."""

    progress: Progress
    is_checkpoint: bool  # False for only an EMA snapshot
    targets: list[Target]  # the EMA snapshot, then the checkpoint
    manifest: dict[str, Any]  # the keys that all targets share
    result: Future[Outcome]  # of this rank's current step: writing its files, then the commit
    written: bool = False  # all ranks have written their files
    bytes: int = 0  # of all files, once they are written

    def judge(self, outcomes: Sequence[Outcome]) -> Verdict:
        """Rank 0: judge the outcomes of all ranks. Their manifest entries stay here; no other rank needs them."""
        for rank, outcome in enumerate(outcomes):
            if outcome.error:
                return Verdict(rank, dataclasses.replace(outcome, files=()))
        if not self.written:
            for number, target in enumerate(self.targets):
                target.files = [outcome.files[number] for outcome in outcomes]
        return Verdict(bytes=sum(file["bytes"] for target in self.targets for file in target.files))
