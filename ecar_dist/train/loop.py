"""The training loop: read, step, average, log, save; and the conditions that end it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import FruitlessError, NodeError
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.restore import Restored
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.export.names import CLASS_NAMES
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.replicas import check_replicas
from ecar_dist.runtime.signals import StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.train.flags import Flags
from ecar_dist.train.guard import Action, StepGuard
from ecar_dist.train.reader import StepReader
from ecar_dist.train.record import Recorder
from ecar_dist.train.step import StepUnderWay, train_step
from ecar_dist.train.telemetry import StepResult, Telemetry
from ecar_dist.train.time_budget import Goodput, Phases
from ecar_dist.train.validation.validate import Validation


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything that a checkpoint restores, besides the progress."""

    # tensors: model and optimizer, and the EMA of the weights
    engine: Engine
    ema: ShardedEma

    # client state
    guard: StepGuard
    goodput: Goodput
    class_names: Sequence[str] = ()

    def client_state(self) -> dict[str, Any]:
        """What a checkpoint stores besides tensors, as JSON values."""
        state = {"bad_steps": self.guard.state_dict(), "goodput": self.goodput.state_dict()}
        return {**state, CLASS_NAMES: list(self.class_names)}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that `train` works with. Each has one job. start.py builds them."""

    # inputs
    config: RunConfig
    world: World
    stop: StopRequest

    # what changes while a run trains
    state: RunState

    # samples in; numbers, pictures and checkpoints out
    reader: StepReader
    telemetry: Telemetry
    recorder: Recorder
    saver: Saver
    validation: Validation | None = None  # None: there are no held-out samples

    def flags(self) -> Flags:
        """The flags that this rank sends to the others now."""
        return self.reader.flags(self.saver.is_ready)._replace(early=float(self.saver.is_early))


def train(parts: Parts, progress: Progress) -> Progress:
    """Train from `progress` until the run ends, a stop signal arrives, or data cannot be read. Collective.

    In each case a checkpoint of the last step is committed. Returns the progress. Raises EcarError on all ranks if data
    cannot be read, if bad steps do not stop, or if the last checkpoint cannot be saved.
    """
    config, state = parts.config, parts.state
    total = config.train.total_samples
    batch = config.batch.global_batch_size
    under_way: deque[StepUnderWay] = deque()  # steps that are queued on the device and not settled yet

    # From here on a signal ends the run between two steps.
    parts.stop.defer()
    while progress.samples_seen < total:
        # Read. A step begins only if all ranks have their samples and none was asked to stop.
        batches = parts.reader.begin(progress)
        if batches is None:
            break
        begun = progress
        progress = Progress(begun.samples_seen + batch, begun.step + 1)

        # Step. After a roll-back the samples around the bad steps count as seen, but are not trained on.
        if state.guard.history.passes_over(progress.step):
            pass_over(parts, progress)
        else:
            step = train_step(
                batches,
                begun,
                parts.flags,
                config=config,
                world=parts.world,
                engine=state.engine,
                telemetry=parts.telemetry,
            )
            under_way.append(step)

        # EMA, even after a step that moved no weight: it is a function of the samples seen.
        state.ema.update(progress.samples_seen, batch)

        # The numbers of the previous step arrived while this one was queued. A bad step has moved no weight. After
        # several in a row the run goes back to its last checkpoint.
        result, earlier = settle_steps(parts, progress, under_way)
        if earlier is not None:
            progress = earlier
            continue

        # Validate, log and draw.
        if result and logs(config, progress):
            validated = validate(parts, progress)
            parts.recorder.log(progress, result, validated)
        if draws(config, progress):
            parts.recorder.draw_preview(progress, state.engine, state.ema)

        # Save, if a save is due. Training continues in the meantime.
        parts.saver.save_due(progress)

    finish(parts, progress)
    return progress


def finish(parts: Parts, progress: Progress) -> None:
    """Save the last step. Then raise the error that ended the run, or report how it went. Collective."""
    # Once the run is complete, a signal has nothing to stop.
    if progress.samples_seen >= parts.config.train.total_samples:
        parts.stop.mark_complete()
    parts.saver.finish(progress)

    # The training state is saved: now report data that could not be read.
    parts.reader.raise_error()
    parts.recorder.close(progress)


def pass_over(parts: Parts, progress: Progress) -> None:
    """Count a step that ends at `progress` without training on its samples. Collective."""
    # Adam's step count is that of the run.
    parts.state.guard.history.pass_over()
    parts.state.engine.set_optimizer_step(progress.step)

    # There is no sum of losses that could carry the flags.
    agreed = Flags(*parts.world.sum(parts.world.tensor(parts.flags())).tolist())
    note_flags(parts, progress.step, agreed)


def note_flags(parts: Parts, step: int, flags: Flags) -> None:
    """Act on the summed flags of step number `step`. Collective."""
    parts.reader.settle(step, flags)
    parts.saver.note_early(flags.early > 0)
    if flags.ready == parts.world.size:
        parts.saver.settle()


def settle_steps(
    parts: Parts, progress: Progress, under_way: deque[StepUnderWay]
) -> tuple[StepResult | None, Progress | None]:
    """Settle all steps but the last, and also the last if its numbers are needed before the next begins. Collective.

    `progress`: after the last step. Returns the result of the last settled step, and the progress that the run was
    rolled back to, or None.
    """
    result = None
    while len(under_way) > (0 if needs_numbers(parts, progress) else 1):
        step = under_way.popleft()
        result, flags = step.read(parts.config)
        note_flags(parts, step.begun.step + 1, flags)
        earlier = settle_step(parts, step, result)
        if earlier is not None:
            under_way.clear()
            return result, earlier
    return result, None


def needs_numbers(parts: Parts, progress: Progress) -> bool:
    """Whether the host needs the numbers of the step that ended at `progress` before the next one begins.

    A pure function of what all ranks know. If the numbers are not needed, the device is never idle between two steps.
    """
    # There is no next step, or the next step depends on this one.
    history = parts.state.guard.history
    if progress.samples_seen >= parts.config.train.total_samples or not parts.reader.goes_on(progress.step):
        return True
    if history.has_limit or history.passes_over(progress.step + 1):
        return True

    # Something is logged, drawn or saved now.
    return logs(parts.config, progress) or draws(parts.config, progress) or parts.saver.is_due(progress)


def logs(config: RunConfig, progress: Progress) -> bool:
    """Whether the step that ended at `progress` is logged."""
    return progress.step % config.log.every_steps == 0


def validate(parts: Parts, progress: Progress) -> dict[str, float]:
    """The validation loss by tag, after a logged step that is the first past a multiple of the interval, or the last.

    Empty after all other steps. Collective.
    """
    config, state = parts.config, parts.state
    logged = config.batch.global_batch_size * config.log.every_steps
    due = crossed(config.train.validate_every_samples, progress.samples_seen, logged)
    if parts.validation is None or not (due or progress.samples_seen >= config.train.total_samples):
        return {}
    return parts.validation.values(progress, state.engine, state.ema)


def draws(config: RunConfig, progress: Progress) -> bool:
    """Whether a preview is drawn after the step that ended at `progress`."""
    every = config.sample.every_samples
    return config.log.tensorboard and crossed(every, progress.samples_seen, config.batch.global_batch_size)


def settle_step(parts: Parts, step: StepUnderWay, result: StepResult) -> Progress | None:
    """Act on the numbers of a step. Returns the progress after a roll-back, None if the run continues. Collective.

    Raises FruitlessError on rank 0, RemoteError on the others, if the run was rolled back too often or cannot be.
    """
    # Count the step, and record the samples that were replaced in it.
    number = step.begun.step + 1
    parts.telemetry.end_step(parts.config.batch.global_batch_size, result.applied)
    parts.recorder.note_replaced(step.batches, result.replaced_samples)

    # Decide what all ranks do next, from numbers that are the same on all of them. A bad step is recorded.
    action = parts.state.guard.settle(number, step.begun.samples_seen, step.batches, result)
    if action is Action.STOP:
        parts.saver.give_up(parts.state.guard.stop_error(number, result))
    if action is not Action.ROLL_BACK:
        return None

    # Go back to the checkpoint: the state, then the data, then the metrics. A step queued after this one is discarded.
    progress = parts.saver.roll_back(number)
    parts.reader.seek(progress.samples_seen)
    parts.recorder.rewind(progress.step)
    return progress


class Saver:
    """Saves a run when a save is due, and rolls it back to its last checkpoint. Every method is collective.

    At most one save is under way at a time. Training continues in the meantime.
    """

    def __init__(
        self, *, config: RunConfig, world: World, state: RunState, store: CheckpointStore, phases: Phases
    ) -> None:
        self._config = config
        self._world = world
        self._state = state
        self._store = store
        self._phases = phases
        self._saved = Progress(0, 0)  # of the newest checkpoint, committed or under way
        self._is_due = False

        # checkpoint.min_seconds: rank 0 reads its clock, and all ranks follow its answer.
        self._save_began = time.monotonic()
        self._waits = config.checkpoint.min_seconds > 0

    def load(self) -> Restored | None:
        """Load the newest checkpoint. Returns None if there is none yet; the state then keeps its initial values.

        Raises NodeError, or RemoteError, on all ranks if their weights differ afterwards.
        """
        # Tensors, compared between ranks.
        self._phases.enter("load", 0)
        restored = self._store.restore(self._state.engine, self._state.ema)
        client_state = restored.client_state if restored else {}
        self._saved = restored.progress if restored else Progress(0, 0)
        check_replicas(self._world, self._state.engine, self._state.ema, self._saved.step)
        self._phases.enter("start", self._saved.step)

        # Client state. Without a checkpoint it starts empty.
        self._state.guard.load_state_dict(client_state.get("bad_steps"))
        self._state.goodput.load_state_dict(client_state.get("goodput"))
        return restored

    @property
    def is_ready(self) -> bool:
        """Whether this rank has done its part of the save under way. Not collective."""
        return self._store.ready

    def settle(self) -> None:
        """Advance the save under way by one stage. All ranks call it in the same step, once all are ready."""
        self._store.settle()

    def is_due(self, progress: Progress) -> bool:
        """Whether `save_due` may have something to save at `progress`. Not collective, but the same on all ranks."""
        checkpoint, ema_snapshot = self._crossed(progress)
        return ema_snapshot or ((self._is_due or checkpoint) and not self._waits)

    @property
    def is_early(self) -> bool:
        """Rank 0: whether less than checkpoint.min_seconds have passed since the last save began. Not collective."""
        passed = time.monotonic() - self._save_began
        return self._world.is_first and passed < self._config.checkpoint.min_seconds

    def note_early(self, early: bool) -> None:
        """Store rank 0's `is_early`, which all ranks have received. All ranks call it in the same step."""
        self._waits = early

    def _crossed(self, progress: Progress) -> tuple[bool, bool]:
        """Whether the last step made a checkpoint due, and whether it made an EMA snapshot due."""
        batch = self._config.batch.global_batch_size
        checkpoint = crossed(self._config.checkpoint.every_samples, progress.samples_seen, batch)
        return checkpoint, crossed(self._config.ema.snapshot_every_samples, progress.samples_seen, batch)

    def save_due(self, progress: Progress) -> None:
        """Begin a checkpoint, an EMA snapshot, or both, if the last step made them due."""
        checkpoint, ema_snapshot = self._crossed(progress)
        self._is_due = self._is_due or checkpoint

        # While steps are bad, the last checkpoint is the one to go back to: the next one waits for a good step.
        checkpoint = self._is_due and not self._waits and not self._state.guard.history.in_a_row
        if checkpoint or ema_snapshot:
            self._begin(progress, checkpoint=checkpoint, ema_snapshot=ema_snapshot)
        if checkpoint:
            self._saved = progress
            self._is_due = False
            self._save_began = time.monotonic()
            self._waits = self._config.checkpoint.min_seconds > 0

    def finish(self, progress: Progress) -> None:
        """Save the last step unless it is saved already, and wait until the checkpoint is committed."""
        if self._saved != progress:
            self._begin(progress, checkpoint=True, ema_snapshot=False)
        self._phases.enter("checkpoint", progress.step)
        self._store.finish()

    def roll_back(self, step: int) -> Progress:
        """Restore the last checkpoint; the steps around the bad ones, up to `step`, will be passed over.

        Ends the run like `give_up` if there is no checkpoint yet.
        """
        self._phases.enter("load", step)
        restored = self._store.restore(self._state.engine, self._state.ema)
        if restored is None:
            self.give_up(
                FruitlessError(
                    f"step {step} is bad like those before it, and there is no checkpoint yet to go back to; see "
                    f"bad_steps.jsonl for the samples, or lower optim.learning_rate"
                )
            )

        # Record the roll-back in the file before the client state is replaced by one that does not contain it.
        self._saved = restored.progress
        self._state.guard.roll_back(step, restored.progress.step, restored.client_state.get("bad_steps"))
        self._state.goodput.load_state_dict(restored.client_state.get("goodput"))
        return restored.progress

    def give_up(self, error: FruitlessError) -> NoReturn:
        """End the run with this error, which is the same on all ranks, once the save under way is committed.

        Raises it on rank 0, and RemoteError on the others.
        """
        self._drain()
        self._world.agree(error)
        raise error

    def _begin(self, progress: Progress, *, checkpoint: bool, ema_snapshot: bool) -> None:
        """Begin to write.

        Raises NodeError, or RemoteError, on all ranks if their copies of the weights differ. In that case nothing of
        this step is written, and the earlier save under way is committed.
        """
        engine, ema = self._state.engine, self._state.ema

        # Weights that differ between ranks must not become a checkpoint.
        self._phases.enter("checkpoint", progress.step)
        try:
            check_replicas(self._world, engine, ema, progress.step)
        except (NodeError, RemoteError):
            self._drain()
            raise

        # The state is copied to host memory. A thread writes it from there.
        client_state = self._state.client_state()
        self._store.begin(progress, engine, ema, client_state, checkpoint=checkpoint, ema_snapshot=ema_snapshot)

    def _drain(self) -> None:
        while self._store.in_flight:
            self._store.settle()


def crossed(every: int, samples_seen: int, batch: int) -> bool:
    """Whether the last `batch` samples took the run past a multiple of `every`; 0 means never."""
    return every > 0 and samples_seen // every > (samples_seen - batch) // every
