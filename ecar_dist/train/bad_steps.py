"""What to do about a step whose loss or gradient is out of bounds: pass on, roll back, or stop.

Pure policy: no tensor, no rank, no file. All ranks feed it the same numbers, so they all decide the same. Its state is
JSON in the checkpoint's notes: a run that resumes decides as the uninterrupted one would.
"""

from __future__ import annotations

import enum
import json
import math
import statistics
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ecar_dist.config.run import BadStepsSection
from ecar_dist.storage.untrusted import UntrustedError, parse_json, parse_record

Window = tuple[int, int]  # first and last step, both included


class Verdict(enum.Enum):
    FINE = "fine"
    SKIPPED = "skipped"  # no weight moved; go on
    ROLL_BACK = "roll back"  # restore the last checkpoint, and pass over `BadSteps.window_to_pass`
    STOP = "stop"  # rolled back often enough


class BadSteps:
    """The bad steps of a run so far, and the steps it passes over since it was rolled back.

    After a roll-back the samples around the bad steps are seen, but not learnt from: the batches that went before a
    spike matter as much as those in it (PaLM, arXiv 2204.02311, section 5.1). One window is kept for each roll-back.
    The notes of the restored checkpoint do not know the newest one, so the caller keeps them in a file besides.
    """

    def __init__(
        self, section: BadStepsSection, notes: Mapping[str, Any] | None = None, windows: Iterable[Window] = ()
    ) -> None:
        """`notes`: as `notes()` gave them, from the restored checkpoint. `windows`: all that the file has."""
        known = notes or {}
        self._section = section
        self._good_norms: deque[float] = deque(known.get("good_norms", ()), maxlen=section.window)
        self.in_a_row: int = known.get("in_a_row", 0)  # bad steps up to now
        self.skipped: int = known.get("skipped", 0)  # steps, refused or passed over, since the run began
        self.windows = sorted({*windows, *((first, last) for first, last in known.get("windows", ()))})
        self.window_to_pass: Window | None = None  # of the roll-back that was asked for

    def notes(self) -> dict[str, Any]:
        """The state, as JSON values."""
        return {
            "good_norms": list(self._good_norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "windows": [list(window) for window in self.windows],
        }

    @property
    def grad_norm_limit(self) -> float:
        """The largest gradient norm that is still good; no limit until half a window of good steps is known."""
        factor, known = self._section.spike_factor, self._good_norms
        if factor == 0 or len(known) < self._section.window // 2:
            return math.inf
        return factor * statistics.median(known)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why the step at hand is bad; None where it is good. Ask before `judge`, which may move the limit."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if grad_norm > (limit := self.grad_norm_limit):
            return (
                f"the gradient norm {grad_norm:.4g} is above {limit:.4g} = {self._section.spike_factor:g} x the median "
                f"of the last {len(self._good_norms)} good steps"
            )
        return None

    def judge(self, step: int, loss: float, grad_norm: float, applied: bool) -> Verdict:
        """What follows from step number `step`, now done; `applied`: whether weights moved. Once for each step that is
        not passed over, in order."""
        if applied and self.fault(loss, grad_norm) is None:
            self._good_norms.append(grad_norm)
            self.in_a_row = 0
            return Verdict.FINE
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self._section.roll_back_after:
            return Verdict.SKIPPED
        if len(self.windows) >= self._section.stop_after:
            return Verdict.STOP
        first_bad = step - self.in_a_row + 1
        self.window_to_pass = (max(1, first_bad - self._section.roll_back_after), step)
        return Verdict.ROLL_BACK

    def passes_over(self, step: int) -> bool:
        """Whether step number `step` sees its samples without learning from them."""
        return any(first <= step <= last for first, last in self.windows)

    def ahead(self, step: int) -> list[Window]:
        """What a run that is at `step` will still pass over."""
        return [(max(first, step + 1), last) for first, last in self.windows if last > step]

    def pass_over(self) -> None:
        """A step was passed over: it is counted, and a row of bad steps ends with it."""
        self.skipped += 1
        self.in_a_row = 0


def bad_step_record(
    step: int, samples_seen: int, loss: float, grad_norm: float, reason: str, sample_ids: Sequence[Sequence[int]]
) -> str:
    """One line of bad_steps.jsonl. `samples_seen`: before the step; `sample_ids`: of each rank, in the order they were
    read. JSON knows no NaN: a number that is not finite is written as text."""
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
    """One line of bad_steps.jsonl: at `step` the run was rolled back, and passes over `window`.

    The line is state: which samples are passed over depends on it. So it says its own CRC-32.
    """
    return json.dumps({"step": step, "pass_over": list(window), "crc32": _sum_of(step, window)}) + "\n"


class RollBack(BaseModel):
    """A line of bad_steps.jsonl that says what is passed over. Earlier versions wrote no sum."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=1, le=1 << 53)
    pass_over: tuple[int, int]
    crc32: int | None = None

    @model_validator(mode="after")
    def _check(self) -> RollBack:
        first, last = self.pass_over
        if not 1 <= first <= last <= self.step:
            raise ValueError(f"steps {first} to {last} are not a window up to step {self.step}")
        if self.crc32 not in (None, _sum_of(self.step, self.pass_over)):
            raise ValueError("it is not what was written")
        return self


def window_in(line: bytes) -> Window | None:
    """The window of one line of bad_steps.jsonl; None where it notes a bad step. Raises UntrustedError."""
    tree = parse_json(line)
    if not isinstance(tree, dict) or "step" not in tree:
        raise UntrustedError("it is not a line of a step")
    # a bad step's line has no say in what the run does: it may hold anything
    return None if "reason" in tree else parse_record(line, RollBack).pass_over


def _sum_of(step: int, window: Window) -> int:
    return zlib.crc32(f"{step} {window[0]} {window[1]}".encode())
