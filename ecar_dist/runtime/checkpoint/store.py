"""Checkpoints that are either whole or do not exist, and that any number of ranks can read (see files.py).

A save stops training for a copy into host memory. A thread of every rank then writes that copy; once all have, a thread
of rank 0 commits. Whether a save stands is decided by all ranks together, in `settle`: a collective that the training
loop calls on all of them in the same step, when all are `ready`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, EcarError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.files import Progress, readable
from ecar_dist.runtime.checkpoint.folder import Draft, open_ema_place, open_place
from ecar_dist.runtime.checkpoint.load import meanings, state_by_kind
from ecar_dist.runtime.checkpoint.manifest import SCHEMA, VALUE_BYTES
from ecar_dist.runtime.checkpoint.restore import Expected, Restored, restore_newest
from ecar_dist.runtime.checkpoint.retention import kept
from ecar_dist.runtime.checkpoint.snapshot import HostSnapshot
from ecar_dist.runtime.checkpoint.writer import Outcome, Share, commit, outcome_of
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import ADAM_MOMENTS, Engine, Fragment
from ecar_dist.runtime.world import World
from ecar_dist.storage.daemon_pool import DaemonPool

_PATIENCE = 10.0  # seconds that `close` gives a thread to notice
_FIX = "see to that, or set checkpoint.dir, and run the same command again"


@dataclass
class _Save:
    """One save on its way: what is written, and the thread that is at it."""

    progress: Progress
    drafts: list[tuple[Draft, tuple[str, ...]]]  # with the kinds that each holds
    manifest: dict[str, Any]
    is_checkpoint: bool
    future: Future[Outcome]
    files: list[list[dict[str, Any]]] = field(default_factory=list)  # of each draft, once all ranks have written


class CheckpointStore:
    """The checkpoints of one run. `begin`, `settle`, `finish` and `restore` are called by all ranks together.

    `identity`: what a checkpoint's weights mean ("model") and the order of its data ("data"), as JSON. `run_id`: whose
    they are; `adopt` takes another run's too. `still_ours` is asked on rank 0 before each commit. For telemetry:
    `stall_seconds` (time that training was held), `bytes_written` (of committed saves, all ranks), `last_committed`
    (step of the newest checkpoint of this attempt, or the one it began from), `failures`.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        identity: dict[str, dict[str, Any]],
        *,
        run_id: str = "",
        still_ours: Callable[[], bool] = lambda: True,
        allow_new_data: bool = False,
        adopt: bool = False,
    ) -> None:
        self.place, self.ema_place = open_place(config), open_ema_place(config)
        self._section, self._averages, self._world = config.checkpoint, meanings(config.ema), world
        self._identity, self._run_id, self._still_ours = identity, run_id, still_ours
        self._allow_new_data, self._adopt = allow_new_data, adopt
        self._since = dict.fromkeys(self._averages, 0)
        self._precision = config.precision_on(world.device.type)
        self._pool, self._stopping = DaemonPool(1, "checkpoint-writer"), threading.Event()
        self._snapshot, self._attempt, self._saves = HostSnapshot(), "", 0
        self._save: _Save | None = None
        self._rejected: set[str] = set()  # checkpoints that this attempt found damaged
        self._failed_in_a_row, self._last_failure = 0, ""
        self.stall_seconds, self.bytes_written, self.failures = 0.0, 0, 0
        self.last_committed: int | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is on its way. The same on all ranks."""
        return self._save is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of the save that is on its way, and `settle` would not wait for it."""
        return self._save is not None and self._save.future.done()

    def begin(
        self,
        progress: Progress,
        engine: Engine,
        ema: ShardedEma,
        notes: dict[str, Any],
        *,
        checkpoint: bool = True,
        averages: bool = False,
    ) -> None:
        """Take a copy of the state, and start to write it: as a checkpoint, as a copy of the averages alone, or both.

        `notes` (JSON, rank 0's) come back from `restore`. A save that is still on its way is finished first. Raises as
        `settle`.
        """
        with self._held():
            self._drain()
            failpoint("checkpoint.snapshot", progress.step)
            state = state_by_kind(engine, ema)
            wanted = state if checkpoint else ema.averages
            owned = self._owned(engine)
            copies = self._snapshot.take(wanted, {fragment.partition for fragment in owned})
            name = f"state-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
            share = Share(name, progress.step, owned, copies, self._stopping)
            drafts = self._drafts(progress.step, tuple(wanted) if checkpoint else (), ema if averages else None)
            future = self._pool.submit(
                outcome_of, lambda: [share.write(draft, kinds) for draft, kinds in drafts], self.place.where
            )
            self._save = _Save(progress, drafts, self._manifest(progress, engine, notes), checkpoint, future)
            if not self._section.overlap:
                self._drain()

    def settle(self) -> None:
        """All ranks look at what their threads did: a failure anywhere is one for all, else the save goes on or stands.

        Waits for a thread that is not `ready`. A failed save is said in one line, and training goes on; raises
        CheckpointError on all ranks (RemoteError on those that say nothing) after `checkpoint.max_failures` in a row,
        and where another attempt has taken over.
        """
        with self._held():
            self._settle()

    def finish(self) -> None:
        """Wait for the save that is on its way. Raises as `settle`, and where the last save failed."""
        with self._held():
            self._drain()
            if self._last_failure:
                self._raise(f"{self._last_failure}; {_FIX}")

    def close(self) -> None:
        """Give up what is on its way. Not a collective; call it whenever a run ends, however it does."""
        self._stopping.set()
        self.place.close()
        self.ema_place.close()
        self._pool.end(_PATIENCE)

    def restore(self, engine: Engine, ema: ShardedEma) -> Restored | None:
        """Load the newest whole checkpoint into engine and averages; None where there is none yet.

        Where one is damaged all ranks together take the one before it. Raises CheckpointError where all are damaged, or
        where the checkpoint is of another model, stage schedule or, unless that is allowed, order of data.
        """
        self._drain()
        self._snapshot.reserve(state_by_kind(engine, ema), {fragment.partition for fragment in self._owned(engine)})
        expected = Expected(
            self._run_id, self._adopt, self._identity, self._averages, self._layout(engine), self._allow_new_data
        )
        restored, self._rejected = restore_newest(self.place, self._world, engine, ema, expected)
        self.last_committed = restored.progress.step if restored else None
        self._since = restored.since if restored else self._since
        return restored

    def needed_bytes(self, engine: Engine) -> int:
        """What one checkpoint takes, all ranks together."""
        values = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
        return values * VALUE_BYTES * (1 + len(ADAM_MOMENTS) + len(self._averages))

    def space_warning(self, engine: Engine) -> str | None:
        """A line, for rank 0 to say at the start, where the place is too small for all that is to be kept there."""
        free, one = self.place.free_bytes(), self.needed_bytes(engine)
        wanted = (self._section.keep + 1 - len(self.place.committed())) * one
        if free is None or free >= wanted:
            return None
        return (
            f"warning: {self.place.where} has {readable(free)} free, and {readable(max(wanted, one))} more are needed: "
            f"checkpoint.keep={self._section.keep} and the one being written, {readable(one)} each; free space, or set "
            f"checkpoint.dir"
        )

    def _owned(self, engine: Engine) -> list[Fragment]:
        """The fragments that this rank writes: what all ranks hold is written once."""
        return engine.fragments[self._world.rank :: self._world.size] if engine.replicated else engine.fragments

    def _drafts(self, step: int, kinds: tuple[str, ...], ema: ShardedEma | None) -> list[tuple[Draft, tuple[str, ...]]]:
        self._attempt = self._attempt or self._world.broadcast(uuid.uuid4().hex[:8])
        self._saves += 1
        attempt = f"{self._attempt}_{self._saves:04d}"
        drafts = [(self.ema_place.draft(step, attempt), tuple(ema.averages))] if ema else []
        return [*drafts, *([(self.place.draft(step, attempt), kinds)] if kinds else [])]

    def _manifest(self, progress: Progress, engine: Engine, notes: dict[str, Any]) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "progress": asdict(progress),
            "notes": json.loads(json.dumps(notes)),  # as it is now: training goes on
            "run": self._run_id,
            "identity": self._identity,
            "averages": self._averages,
            "averages_since": self._since,
            "shapes": engine.shapes,
            **self._layout(engine),
        }

    def _layout(self, engine: Engine) -> dict[str, Any]:
        return {"world_size": self._world.size, "zero_stage": engine.zero_stage, "precision": self._precision}

    @contextmanager
    def _held(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.stall_seconds += time.monotonic() - began

    def _drain(self) -> None:
        while self._save is not None:
            self._settle()

    def _settle(self) -> None:
        save = self._save
        if save is None:
            return
        outcomes: list[Outcome] = self._world.gather(save.future.result())
        failed = next(((rank, one) for rank, one in enumerate(outcomes) if one.error), None)
        if failed is not None:
            self._save = None
            self._fail(save, *failed)
        elif not save.files:
            save.files = [list(entries) for entries in zip(*(one.files for one in outcomes), strict=True)]
            save.future = self._start_commit(save)
        else:
            self._save = None
            self._stand(save)

    def _start_commit(self, save: _Save) -> Future[Outcome]:
        if self._world.is_first:
            return self._pool.submit(outcome_of, lambda: self._commit(save), self.place.where)
        done: Future[Outcome] = Future()
        done.set_result(Outcome())
        return done

    def _commit(self, save: _Save) -> list[dict[str, Any]]:
        """Rank 0's thread."""
        manifests = [json.dumps({**save.manifest, "files": files}).encode() for files in save.files]
        drafts = [draft for draft, _ in save.drafts]
        commit(list(zip(drafts, manifests, strict=True)), self.place, self._still_ours)
        try:
            self._sweep(drafts[-1].name if save.is_checkpoint else None)
        except (OSError, EcarError) as error:
            print(f"warning: old checkpoints in {self.place.where} could not be removed: {error}", file=sys.stderr)
        return []

    def _sweep(self, newest: str | None) -> None:
        """Drop what is not to be kept. What lies after the newest was damaged: this attempt did not begin there."""
        self.ema_place.sweep(set(self.ema_place.committed()))
        if newest is None:
            return
        found = [(name, seen) for name, seen in self.place.whole() if name == newest or name not in self._rejected]
        names = [name for name, _ in found]
        if newest in names:  # else the place does not show it yet, and nothing is dropped for it
            found = found[names.index(newest) :]
            self.place.sweep(kept(found, self._section.keep, self._section.keep_every_samples))

    def _stand(self, save: _Save) -> None:
        self._failed_in_a_row, self._last_failure = 0, ""
        self.bytes_written += sum(entry["bytes"] for files in save.files for entry in files)
        if save.is_checkpoint:
            self.last_committed = save.progress.step

    def _fail(self, save: _Save, rank: int, outcome: Outcome) -> None:
        """The same on all ranks. Raises where it must not go on."""
        if outcome.taken_over:
            self._raise(str(outcome.error))
        self.failures += 1
        self._failed_in_a_row += 1
        room = ""
        if self._world.is_first:
            for draft, _ in save.drafts:
                draft.discard()
            room = self._room(save) if outcome.full else ""
        last = self.last_committed
        whole = "there is no checkpoint yet" if last is None else f"the last one that was saved is of step {last}"
        what = f"the {'checkpoint' if save.is_checkpoint else 'copy of the averages'} of step {save.progress.step}"
        self._last_failure = f"{what} was not saved: rank {rank}: {outcome.error}{room}; {whole}"
        if self._failed_in_a_row >= self._section.max_failures:
            self._raise(f"{self._last_failure}; that was failure {self._failed_in_a_row} in a row; {_FIX}")
        if self._world.is_first:
            print(f"warning: {self._last_failure}; training goes on", file=sys.stderr)

    def _room(self, save: _Save) -> str:
        free = self.place.free_bytes()
        kinds = sum(len(kinds) for _, kinds in save.drafts)
        needed = sum(torch.Size(shape).numel() for shape in save.manifest["shapes"].values()) * kinds * VALUE_BYTES
        return "" if free is None else f" (it needs {readable(needed)}, and {readable(free)} are free)"

    def _raise(self, message: str) -> None:
        """One line, by rank 0, and the end of the others."""
        self._world.agree(CheckpointError(message) if self._world.is_first else None)
