"""What a bad step is, and what follows it: skip, roll back, or stop.

`is_good` alone decides whether a step is bad: the engine calls it before it moves a weight. `BadSteps` is the policy
for what follows, `StepGuard` carries it out on all ranks, and `BadStepFile` is its record, bad_steps.jsonl in the run
directory.
"""

from __future__ import annotations

import enum
import json
import math
import os
import statistics
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ecar_dist.command_line import counted, say
from ecar_dist.config.knobs_training import BadStepsSection
from ecar_dist.data.loader import MicroBatch
from ecar_dist.errors import FruitlessError, reason_of
from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import set_aside, sync_to_disk
from ecar_dist.storage.untrusted import JsonLines, UntrustedError, parse_json, parse_record
from ecar_dist.train.telemetry import StepResult

Number = TypeVar("Number", float, torch.Tensor)
Window = tuple[int, int]  # first and last step that a roll-back passes over, both included

_COST = "a roll-back since the last checkpoint may be repeated"


def is_good(loss: Number, grad_norm: Number, limit: float = math.inf) -> Any:
    """Whether a step may move the weights: loss and gradient norm are finite, and the norm is at most `limit`.

    Pure, and the same for numbers on the host and for scalar tensors on a device: a bool, or a bool tensor [].
    """
    # Any comparison with NaN is false, so each of these is false for NaN.
    return (abs(loss) < math.inf) & (abs(grad_norm) < math.inf) & (grad_norm <= limit)


class Action(enum.Enum):
    """What follows a step. The value is its name in the log."""

    GO_ON = "good"
    SKIP = "skipped"  # no weight moved; training continues
    ROLL_BACK = "roll back"  # to the last checkpoint; `BadSteps.window_to_pass` will be passed over
    STOP = "stop"  # the run was rolled back too often


class BadSteps:
    """The bad steps of a run so far, and the steps that it passes over because it was rolled back.

    Pure policy: no tensor, no rank, no file. All ranks feed it the same numbers, so they all make the same decision.
    Its state is JSON in the checkpoint's client state: a resumed run decides as the uninterrupted run does.

    After a roll-back the samples around the bad steps count as seen, but are not trained on: the batches before a spike
    matter as much as those in it (PaLM, arXiv 2204.02311, section 5.1). There is one window for each roll-back. The
    restored checkpoint does not contain the newest one, so the caller also keeps the windows in a file.
    """

    def __init__(
        self, section: BadStepsSection, state: Mapping[str, Any] | None = None, windows: Iterable[Window] = ()
    ) -> None:
        """`state`: the `state_dict` in the restored checkpoint. `windows`: all windows in the file."""
        known = state or {}
        self._section = section

        # The norms of the last good steps, which set the limit.
        self._good_norms: deque[float] = deque(known.get("good_norms", ()), maxlen=section.window)

        # Consecutive bad steps up to now; and all steps refused or passed over since the run began.
        self.in_a_row: int = known.get("in_a_row", 0)
        self.skipped: int = known.get("skipped", 0)

        # The windows that are passed over; and that of the roll-back that `judge` asked for.
        self.windows = sorted({*windows, *((first, last) for first, last in known.get("windows", ()))})
        self.window_to_pass: Window | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state, as JSON values."""
        return {
            "good_norms": list(self._good_norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "windows": [list(window) for window in self.windows],
        }

    @property
    def has_limit(self) -> bool:
        """Whether the gradient norms of the last steps limit that of the next."""
        return self._section.spike_factor > 0

    @property
    def grad_norm_limit(self) -> float:
        """The largest gradient norm of a good step; infinite until half a window of good steps is known."""
        # Without a spike factor, or after too few good steps, only a norm that is not finite is bad.
        factor = self._section.spike_factor
        if not self.has_limit or len(self._good_norms) < self._section.window // 2:
            return math.inf
        return factor * statistics.median(self._good_norms)

    def judge(self, step: int, grad_norm: float, applied: bool) -> Action:
        """What follows step number `step`; `applied`: whether weights moved, as `is_good` decided.

        Call it once for each step that is not passed over, in order.
        """
        # A good step updates the limit, and ends a series of bad ones.
        if applied:
            self._good_norms.append(grad_norm)
            self.in_a_row = 0
            return Action.GO_ON

        # A few bad steps in a row are skipped: their gradients are dropped, and training continues.
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self._section.roll_back_after:
            return Action.SKIP

        # More of them mean that the weights are already bad: go back, unless that has not helped before.
        if len(self.windows) >= self._section.stop_after:
            return Action.STOP

        # The next attempt passes over the bad steps, and over the same number of steps before them.
        first_bad = step - self.in_a_row + 1
        self.window_to_pass = (max(1, first_bad - self._section.roll_back_after), step)
        return Action.ROLL_BACK

    def reason(self, loss: float, grad_norm: float) -> str:
        """Why a step with these numbers was refused, for the log."""
        # In the order of `is_good`.
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        return (
            f"the gradient norm {grad_norm:.4g} is above {self.grad_norm_limit:.4g} = {self._section.spike_factor:g} x "
            f"the median of the last {len(self._good_norms)} good steps"
        )

    def passes_over(self, step: int) -> bool:
        """Whether step number `step` counts its samples as seen without training on them."""
        return any(first <= step <= last for first, last in self.windows)

    def pass_over(self) -> None:
        """Count a step that was passed over; it ends a series of bad steps."""
        self.skipped += 1
        self.in_a_row = 0

    def ahead(self, step: int) -> list[Window]:
        """The windows that a run at `step` has yet to pass over."""
        return [(max(first, step + 1), last) for first, last in self.windows if last > step]


class StepGuard:
    """Keeps bad steps away from the weights, records them, and decides what follows. All ranks make the same calls.

    Call `load_state_dict` before the first step, even if there is no checkpoint.
    """

    def __init__(self, section: BadStepsSection, file: BadStepFile, world: World) -> None:
        self._section = section
        self._file = file
        self._world = world
        self.history = BadSteps(section)

    def is_good(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """The check that the engine calls, with the current limit. Nothing here waits for the device."""
        # the history is on the host, so the limit is already a number
        good: torch.Tensor = is_good(loss, grad_norm, self.history.grad_norm_limit)
        return good

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores, as JSON values."""
        return self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint, or from the start (None), with the windows in bad_steps.jsonl. Collective."""
        # The file may contain roll-backs that happened after the checkpoint.
        self.history = BadSteps(self._section, state, self._file.windows())

    def settle(self, step: int, samples_seen: int, batches: Sequence[MicroBatch], result: StepResult) -> Action:
        """What follows step number `step`, which began at `samples_seen`; a bad one is recorded. Collective."""
        # All ranks have the same numbers, so all make the same decision.
        action = self.history.judge(step, result.grad_norm, result.applied)
        if action is Action.GO_ON:
            return action

        # Record the reason and the samples: the user may have to look at them.
        reason = self.history.reason(result.loss, result.grad_norm)
        sample_ids = [sample_id for micro in batches for sample_id in micro.sample_ids.tolist()]
        self._file.note_step(step, samples_seen, result.loss, result.grad_norm, reason, sample_ids)
        if self._world.is_first:
            say(f"step {step} moved no weight: {reason} ({action.value})")
        return action

    def stop_error(self, step: int, result: StepResult) -> FruitlessError:
        """Why the run ends with this step, after `settle` returned STOP."""
        reason = self.history.reason(result.loss, result.grad_norm)
        return FruitlessError(
            f"step {step}: {reason}, and the run was rolled back {len(self.history.windows)} times before; see "
            f"bad_steps.jsonl for the samples, lower optim.learning_rate, or raise train.bad_steps.stop_after"
        )

    def roll_back(self, step: int, restored_step: int, state: Mapping[str, Any] | None) -> None:
        """Go back from `step` to the checkpoint of `restored_step`, which has this state. Collective."""
        # Write the window to disk first: it must survive a crash right after this.
        window = self.history.window_to_pass
        assert window is not None
        self._file.note_roll_back(step, window)
        if self._world.is_first:
            say(f"rolled back to step {restored_step}; steps {window[0]} to {window[1]} will be passed over")

        # The checkpoint's state does not contain this roll-back; the file does.
        self.load_state_dict(state)


class BadStepFile:
    """The lines about bad steps, which are a log, and about roll-backs, which are state. Every method is collective.

    Only rank 0 accesses the file. A lost window causes at most another roll-back, so damage to the file never ends a
    run: the client state of a checkpoint has every window that was known when it was made. Damage is reported.
    """

    def __init__(self, path: Path, world: World) -> None:
        self._path = path
        self._world = world

    def windows(self) -> list[Window]:
        """The windows of all roll-backs of the run so far, as far as the file can be read. Warns if it cannot."""
        found = self._world.on_first_rank(lambda: _read_windows(self._path))
        return [(first, last) for first, last in self._world.broadcast(found)]

    def note_step(
        self, step: int, samples_seen: int, loss: float, grad_norm: float, reason: str, own_samples: Sequence[int]
    ) -> None:
        """Note a bad step with the samples of every rank, in the order in which each read them.

        If the line cannot be written, the run continues.
        """
        # Each rank has read different samples, and rank 0 writes.
        ids = self._world.gather(list(own_samples))
        line = bad_step_record(step, samples_seen, loss, grad_norm, reason, ids)
        self._world.on_first_rank(lambda: _append_or_warn(self._path, line))

    def note_roll_back(self, step: int, window: Window) -> None:
        """Note a roll-back. The line is on disk when this returns, so the window survives a crash after it.

        Raises OSError on rank 0, RemoteError on the others.
        """
        line = roll_back_record(step, window)
        self._world.on_first_rank(lambda: _append_synced(self._path, line))


def bad_step_record(
    step: int, samples_seen: int, loss: float, grad_norm: float, reason: str, sample_ids: Sequence[Sequence[int]]
) -> str:
    """One line about a bad step. `samples_seen`: before the step; `sample_ids`: of each rank, in reading order.

    JSON has no NaN: a number that is not finite is written as text.
    """
    # The number that is not finite is often the reason.
    numbers = {"loss": loss, "grad_norm": grad_norm}
    record = {
        "step": step,
        "samples_seen": samples_seen,
        **{name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
        "reason": reason,
        "sample_ids": [list(ids) for ids in sample_ids],
    }
    return json.dumps(record) + "\n"


def roll_back_record(step: int, window: Window) -> str:
    """One line about a roll-back: the run went back at `step`, and passes over `window`.

    The line is state: it decides which samples are passed over. So it carries its own CRC-32.
    """
    return json.dumps({"step": step, "pass_over": list(window), "crc32": _checksum(step, window)}) + "\n"


class RollBack(BaseModel):
    """The line of a roll-back, checked. Lines of earlier versions have no checksum."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=1, le=1 << 53)
    pass_over: tuple[int, int]
    crc32: int | None = None

    @model_validator(mode="after")
    def _check(self) -> RollBack:
        # A damaged line must never select different steps, so the entire line is refused.
        first, last = self.pass_over
        if not 1 <= first <= last <= self.step:
            raise ValueError(f"steps {first} to {last} are not a window up to step {self.step}")
        if self.crc32 not in (None, _checksum(self.step, self.pass_over)):
            raise ValueError("the line does not match its CRC-32")
        return self


def parse_window(line: bytes) -> Window | None:
    """The window of one line; None for the line of a bad step. Raises UntrustedError for a damaged line."""
    tree = parse_json(line)
    if not isinstance(tree, dict) or "step" not in tree:
        raise UntrustedError("the line does not name a step")
    # The line of a bad step does not change what the run does: it may contain anything.
    return None if "reason" in tree else parse_record(line, RollBack).pass_over


def _checksum(step: int, window: Window) -> int:
    return zlib.crc32(f"{step} {window[0]} {window[1]}".encode())


def _read_windows(path: Path) -> list[Window]:
    # A file that cannot be read is kept for the user, and the run continues with an empty one.
    try:
        with JsonLines(path, parse_window) as lines:
            windows = [window for window in lines if window is not None]
    except FileNotFoundError:
        return []
    except (UntrustedError, OSError) as error:
        aside = set_aside(path)
        print(f"warning: {path} cannot be read ({reason_of(error)}): it is now {aside.name}; {_COST}", file=sys.stderr)
        return []

    # A damaged line does not affect the others.
    if lines.damaged:
        print(f"warning: {path} has {counted(lines.damaged, 'damaged line')}; {_COST}", file=sys.stderr)
    return windows


def _append_or_warn(path: Path, line: str) -> None:
    try:
        _append_synced(path, line)
    except OSError as error:
        print(f"warning: cannot append to {path} ({reason_of(error)}); training continues", file=sys.stderr)


def _append_synced(path: Path, line: str) -> None:
    with open(path, "ab+") as file:
        # A killed process may have left a torn last line: start a new one.
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode())

        # On disk before anyone acts on it.
        file.flush()
        os.fsync(file.fileno())
    sync_to_disk(path.parent)
