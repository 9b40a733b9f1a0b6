"""The checkpoints of a run: saved during training, committed completely or not at all, restored by any number of ranks.

A save, from the first step to the commit:

    begin     all ranks copy their state to host memory (save.HostSnapshot); training continues
              a thread of every rank writes the rank's file (save.RankShare)
    settle    rank 0 gathers the results and informs the others; an error on one rank is an error on all
              a thread of rank 0 writes the manifest and makes the checkpoint visible (save.commit)
    settle    rank 0 reports the result; old checkpoints have been removed

`settle` is a collective. The training loop calls it on all ranks in the same step, once all are `ready`. For what a
resume does, see restore.py; for the files of a checkpoint, files.py.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ecar_dist.command_line import counted
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, EcarError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.files import readable
from ecar_dist.runtime.checkpoint.manifest import VALUE_BYTES, Progress
from ecar_dist.runtime.checkpoint.restore import Expected, Restored, restore_newest
from ecar_dist.runtime.checkpoint.save import (
    HostSnapshot,
    Outcome,
    RankShare,
    Save,
    Target,
    Verdict,
    commit,
    even_share,
    outcome_of,
    state_by_kind,
)
from ecar_dist.runtime.checkpoint.storage import open_ema_storage, open_storage
from ecar_dist.runtime.ema import ShardedEma, ema_kinds
from ecar_dist.runtime.engine import Engine, Fragment
from ecar_dist.runtime.optimizer import ADAM_MOMENTS
from ecar_dist.runtime.world import World
from ecar_dist.storage.daemon_pool import DaemonPool

# How long `close` waits for the thread to end.
_CLOSE_SECONDS = 10.0
# The end of an error message: what the user has to do.
_FIX = "fix that, or set checkpoint.dir, and run the same command again"


class CheckpointStore:
    """The checkpoints of one run. All ranks call `begin`, `settle`, `finish` and `restore` together.

    identity: what must not change during a run, as JSON: "model" (the meaning of the weights) and "data" (the
        order of the samples). `allow_new_data` allows a resume with a different order.
    run_id: the id of the run. `adopt` allows a resume from checkpoints of another run.
    still_ours: called on rank 0 before each commit; False if another attempt has taken over the run.
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
        self.storage = open_storage(config)
        self.ema_storage = open_ema_storage(config)

        # For telemetry.
        self.stall_seconds = 0.0  # time that training has waited for saves
        self.bytes_written = 0  # by all ranks, in committed saves
        self.failures = 0
        self.last_committed: int | None = None  # step of the newest checkpoint that was saved or resumed from

        # What every manifest contains, and what a checkpoint is compared with before a resume.
        self._section = config.checkpoint
        self._world = world
        self._identity = identity
        self._run_id = run_id
        self._still_ours = still_ours
        self._allow_new_data = allow_new_data
        self._adopt = adopt
        self._precision = config.precision_on(world.device.type)
        self._ema_kinds = ema_kinds(config.ema)
        self._ema_since = dict.fromkeys(self._ema_kinds, 0)

        # One thread, so that the steps of saves never overlap.
        self._pool = DaemonPool(1, "checkpoint-writer")
        self._stopping = threading.Event()
        self._snapshot = HostSnapshot()
        self._save: Save | None = None

        # Together they name the pending files of one save.
        self._attempt = ""
        self._saves = 0

        # What went wrong so far: checkpoints that a restore passed over, and failed saves.
        self._damaged: set[str] = set()
        self._failures_in_a_row = 0
        self._last_failure = ""  # empty if the last save was committed

    @property
    def in_flight(self) -> bool:
        """Whether a save is under way. The same on all ranks."""
        return self._save is not None

    @property
    def ready(self) -> bool:
        """Whether `settle` would not wait for this rank."""
        return self._save is not None and self._save.result.done()

    def begin(
        self,
        progress: Progress,
        engine: Engine,
        ema: ShardedEma,
        client_state: dict[str, Any],
        *,
        checkpoint: bool = True,
        ema_snapshot: bool = False,
    ) -> None:
        """Copy the state, and start to write it as a checkpoint, as an EMA snapshot, or as both.

        client_state: JSON that `restore` returns; rank 0's is stored.

        Raises like `settle`, because a save that is still under way is finished first.
        """
        with self._stalled():
            self._finish_save()
            failpoint("checkpoint.snapshot", progress.step)

            # Copy this rank's state to host memory. From here on training may change the original.
            state = state_by_kind(engine, ema) if checkpoint else ema.by_kind
            fragments = self._fragments_to_write(engine)
            copies = self._snapshot.take(state, {fragment.partition for fragment in fragments})

            # The EMA snapshot comes first: it is committed first, and a failed checkpoint does not undo it.
            targets = []
            attempt = self._next_attempt()
            if ema_snapshot:
                targets.append(Target(self.ema_storage.new_checkpoint(progress.step, attempt), tuple(ema.by_kind)))
            if checkpoint:
                targets.append(Target(self.storage.new_checkpoint(progress.step, attempt), tuple(state)))

            # The thread writes this rank's file for each target.
            name = f"state-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
            even = even_share(engine, self._world.rank, self._world.size)
            share = RankShare(name, progress.step, fragments, copies, self._stopping, even)
            result = self._pool.submit(
                outcome_of, lambda: [share.write(target) for target in targets], self.storage.where
            )
            manifest = self._manifest(progress, engine, client_state)
            self._save = Save(progress, checkpoint, targets, manifest, result)

            # checkpoint.overlap=false: training waits for the commit.
            if not self._section.overlap:
                self._finish_save()

    def settle(self) -> None:
        """All ranks exchange the results of their threads. A save then continues, is committed, or has failed.

        Waits for threads that are not `ready`. After a failed save, training continues with a warning.

        Raises:
            CheckpointError: on rank 0, after `checkpoint.max_failures` failures in a row, or if another attempt has
                taken over. The other ranks raise RemoteError.
        """
        with self._stalled():
            self._settle()

    def finish(self) -> None:
        """Wait for the save that is under way. Raises like `settle`, and if the last save failed."""
        with self._stalled():
            self._finish_save()
            # The checkpoint at the end of a run must exist, so a single failure is an error.
            if self._last_failure:
                self._raise(f"{self._last_failure}; {_FIX}")

    def close(self) -> None:
        """Abandon the save that is under way. Call it whenever a run ends, even after an error. Not a collective."""
        # The thread notices at the next tensor, or at the end of a request.
        self._stopping.set()
        self.storage.close()
        self.ema_storage.close()
        self._pool.end(_CLOSE_SECONDS)

    def restore(self, engine: Engine, ema: ShardedEma) -> Restored | None:
        """Load the newest checkpoint that is not damaged into engine and EMA; None if there is no checkpoint yet.

        Raises CheckpointError if all are damaged, or if it is from a different run, model or sample order.
        """
        # A roll-back may begin during a save. It returns to the checkpoint of that save.
        self._finish_save()
        expected = Expected(
            run_id=self._run_id,
            adopt=self._adopt,
            identity=self._identity,
            ema_kinds=self._ema_kinds,
            layout=self._layout(engine),
            allow_new_data=self._allow_new_data,
        )
        restored, self._damaged = restore_newest(self.storage, self._world, engine, ema, expected)

        # Later manifests repeat the step since which each EMA has been unchanged.
        self.last_committed = None
        if restored:
            self.last_committed = restored.progress.step
            self._ema_since = restored.ema_since

        # Allocate the host buffers now: the first save then takes no longer than later ones.
        partitions = {fragment.partition for fragment in self._fragments_to_write(engine)}
        self._snapshot.reserve(state_by_kind(engine, ema), partitions)
        return restored

    def needed_bytes(self, engine: Engine) -> int:
        """The size of one checkpoint, over all ranks."""
        values = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
        return values * VALUE_BYTES * (1 + len(ADAM_MOMENTS) + len(self._ema_kinds))

    def space_warning(self, engine: Engine) -> str | None:
        """Rank 0, at the start: a warning if the storage has too little space for the checkpoints to keep."""
        free = self.storage.free_bytes()
        size = self.needed_bytes(engine)
        # While a checkpoint is written, there is one more than is kept.
        missing = self._section.keep + 1 - len(self.storage.committed())
        if free is None or free >= missing * size:
            return None
        return (
            f"warning: {self.storage.where} has {readable(free)} free, but {readable(missing * size)} "
            f"more are needed: checkpoint.keep={self._section.keep} and one being written, {readable(size)} each; "
            f"free space, or set checkpoint.dir"
        )

    def _fragments_to_write(self, engine: Engine) -> list[Fragment]:
        """The fragments in this rank's file. Fragments that all ranks hold are written by only one of them."""
        return engine.fragments[self._world.rank :: self._world.size] if engine.replicated else engine.fragments

    def _next_attempt(self) -> str:
        """A name for the files of one save, the same on all ranks and different from every other save."""
        self._attempt = self._attempt or self._world.broadcast(uuid.uuid4().hex[:8])
        self._saves += 1
        return f"{self._attempt}_{self._saves:04d}"

    def _manifest(self, progress: Progress, engine: Engine, client_state: dict[str, Any]) -> dict[str, Any]:
        """checkpoint.json without its schema and files. See manifest.Manifest."""
        return {
            "progress": asdict(progress),
            # A copy, because training changes the original during the save.
            "notes": copy.deepcopy(client_state),
            "run": self._run_id,
            "identity": self._identity,
            "averages": self._ema_kinds,
            "averages_since": self._ema_since,
            "shapes": engine.shapes,
            **self._layout(engine),
        }

    def _layout(self, engine: Engine) -> dict[str, Any]:
        return {"world_size": self._world.size, "zero_stage": engine.zero_stage, "precision": self._precision}

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """Count the time of the block as time that training waits."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stall_seconds += time.monotonic() - began

    def _finish_save(self) -> None:
        while self._save is not None:
            self._settle()

    def _settle(self) -> None:
        save = self._save
        if save is None:
            return

        # An error on any rank is an error on all, so that all take the same branch. Only rank 0 gets all results.
        outcomes = self._world.gather_to_first(save.result.result())
        verdict: Verdict = self._world.broadcast(outcomes and save.judge(outcomes))
        if verdict.failed is not None:
            self._save = None
            self._handle_failure(save, verdict.failed, verdict.outcome)
            return

        # All ranks have written: rank 0 commits, the others have nothing to do until the next `settle`.
        if not save.written:
            save.written = True
            save.bytes = verdict.bytes
            step = partial(self._commit, save) if self._world.is_first else list
            save.result = self._pool.submit(outcome_of, step, self.storage.where)
            return

        # Rank 0 has committed.
        self._save = None
        self._failures_in_a_row = 0
        self._last_failure = ""
        self.bytes_written += save.bytes
        if save.is_checkpoint:
            self.last_committed = save.progress.step

    def _commit(self, save: Save) -> list[dict[str, Any]]:
        """The thread of rank 0."""
        commit(save.targets, save.manifest, self._still_ours, self.storage.where)

        # The checkpoint is committed, whatever happens to old ones.
        try:
            self._remove_old(save.targets[-1].pending.name if save.is_checkpoint else None)
        except (OSError, EcarError) as error:
            print(f"warning: cannot remove old checkpoints in {self.storage.where}: {error}", file=sys.stderr)
        return []

    def _remove_old(self, newest: str | None) -> None:
        """Remove checkpoints that are not kept, and what failed saves left behind. newest: the one just committed."""
        self.ema_storage.keep_only(set(self.ema_storage.committed()))
        if newest is None:
            return

        # Damaged checkpoints do not count as kept, or they would push out good ones.
        found = [(name, seen) for name, seen in self.storage.complete() if name == newest or name not in self._damaged]
        names = [name for name, _ in found]

        # If the storage does not list the new checkpoint yet, remove nothing. Otherwise drop newer checkpoints: they
        # were damaged, so this attempt resumed from an older one.
        if newest in names:
            found = found[names.index(newest) :]
            self.storage.keep_only(names_to_keep(found, self._section.keep, self._section.keep_every_samples))

    def _handle_failure(self, save: Save, rank: int, outcome: Outcome) -> None:
        """Warn on rank 0, or raise on all ranks. All ranks have the same arguments."""
        # Of two attempts at the same run, only one may write.
        if outcome.taken_over:
            self._raise(str(outcome.error))

        # Free the space now: the next save needs it.
        self.failures += 1
        self._failures_in_a_row += 1
        if self._world.is_first:
            for target in save.targets:
                target.pending.discard()

        # The message: what failed, why, and what is still there.
        what = f"the {'checkpoint' if save.is_checkpoint else 'EMA snapshot'} of step {save.progress.step}"
        why = f"rank {rank}: {outcome.error}"
        if outcome.disk_full and self._world.is_first:
            why += self._space(save)
        last = "no checkpoint yet" if self.last_committed is None else f"last checkpoint: step {self.last_committed}"
        self._last_failure = f"{what} was not saved: {why}; {last}"

        # One failed save costs little. Many in a row mean that a crash would lose a lot.
        if self._failures_in_a_row >= self._section.max_failures:
            self._raise(f"{self._last_failure}; {counted(self._failures_in_a_row, 'save')} failed in a row; {_FIX}")
        if self._world.is_first:
            print(f"warning: {self._last_failure}; training continues", file=sys.stderr)

    def _space(self, save: Save) -> str:
        free = self.storage.free_bytes()
        kinds = sum(len(target.kinds) for target in save.targets)
        values = sum(torch.Size(shape).numel() for shape in save.manifest["shapes"].values())
        needed = values * kinds * VALUE_BYTES
        return "" if free is None else f" (it needs {readable(needed)}, and {readable(free)} are free)"

    def _raise(self, message: str) -> None:
        """Raise CheckpointError with the message on rank 0, RemoteError on the others."""
        self._world.agree(CheckpointError(message) if self._world.is_first else None)


def names_to_keep(found: Sequence[tuple[str, int]], keep: int, keep_every_samples: int) -> set[str]:
    """The names of the checkpoints to keep. found: (name, samples_seen), newest first.

    These are the newest `keep` and, permanently, the first at or after each multiple of `keep_every_samples` (0: none).
    """
    names = {name for name, _ in found[:keep]}

    # Start with the oldest: a checkpoint that is the first past a multiple is kept.
    last_multiple = 0
    for name, samples_seen in reversed(found):
        multiple = samples_seen // keep_every_samples if keep_every_samples else 0
        if multiple > last_multiple:
            names.add(name)
            last_multiple = multiple
    return names
