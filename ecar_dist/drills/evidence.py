"""What a drill expected and what it saw, and the comparisons that all drills share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.drills.processes import Ended, last_words
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.files import verify
from ecar_dist.storage.untrusted import JsonLines, parse_object

_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Finding:
    """One check of a drill."""

    expected: str
    seen: str
    ok: bool


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or similar log, without a line cut off by a kill; empty if there is no file."""
    try:
        with JsonLines(path, parse_object, tail=_MOST_BYTES) as lines:
            return list(lines)
    except FileNotFoundError:
        return []


def losses(metrics: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The loss by step; the later one if a step is logged twice. A loss that is not finite is logged as null."""
    return {entry["step"]: math.nan if (loss := entry["train/loss"]) is None else loss for entry in metrics}


def same_losses(
    found: Mapping[int, float], quiet: Mapping[int, float], tolerance: float, whose: str = "the quiet run's"
) -> Finding:
    """Every loss of the quiet run is present and equal. Other steps are ignored."""
    if not quiet:
        return Finding(f"the losses equal {whose}", "there are none to compare with", False)
    expected = f"the losses of steps {min(quiet)} to {max(quiet)} equal {whose}, to {tolerance:g} relative"
    missing = sorted(quiet.keys() - found.keys())
    if missing:
        return Finding(expected, f"{len(missing)} steps have none, the first is step {missing[0]}", False)
    worst, step = max(((_difference(found[step], loss), step) for step, loss in quiet.items()))
    return Finding(
        expected, f"largest difference {worst:.1e}" + (f" at step {step}" if worst else ""), worst <= tolerance
    )


def _difference(a: float, b: float) -> float:
    """Relative difference; infinite if one of the two is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def every_step_once(metrics: Sequence[Mapping[str, Any]], steps: int) -> Finding:
    found = [entry["step"] for entry in metrics]
    wanted = list(range(1, steps + 1))
    seen = f"{len(found)} lines" if found != wanted else f"steps 1 to {steps}"
    if absent := sorted(set(wanted) - set(found)):
        seen += f", step {absent[0]} absent"
    if twice := sorted({step for step in found if found.count(step) > 1}):
        seen += f", step {twice[0]} more than once"
    return Finding(f"metrics.jsonl has each of {steps} steps once", seen, found == wanted)


def ended_well(ended: Ended) -> Finding:
    seen = "exit 0" if ended.status == 0 else f"{_status(ended)}: {last_words(ended.text)}"
    return Finding("it trains to the end, exit 0", seen, ended.status == 0)


def ended_within(ended: Ended, seconds: float) -> Finding:
    """The whole job ends soon after a fault."""
    ok = ended.status not in (None, 0) and ended.seconds <= seconds
    return Finding(f"the job ends within {seconds:.0f} s", f"{_status(ended)} after {ended.seconds:.1f} s", ok)


def no_orphans(ended: Ended) -> Finding:
    seen = "none" if not ended.orphans else f"{len(ended.orphans)} left: {ended.orphans[0]}"
    return Finding("no process is left", seen, ended.status is not None and not ended.orphans)


def rank_statuses(ended: Ended, expected: int, *allowed: int) -> Finding:
    """One failed rank has the expected exit status, and none has a status that is not allowed."""
    found = ended.rank_statuses
    seen = ", ".join(f"rank {rank}: {status}" for rank, status in sorted(found.items())) or "no rank reported one"
    ok = expected in found.values() and set(found.values()) <= {expected, *allowed}
    return Finding(f"the ranks' exit status is {expected}", seen, ok)


def one_line_with(ended: Ended, expected: str, *parts: str, beginning: str = "ecar-dist: ") -> Finding:
    """Exactly one of our lines contains all the parts."""
    found = [line for line in ended.lines(beginning) if all(part in line for part in parts)]
    if len(found) == 1:
        return Finding(expected, found[0].removeprefix("ecar-dist: "), True)
    return Finding(expected, f"{len(found)} such lines; the last line: {last_words(ended.text)}", False)


def whole_checkpoints(folder: Path, found: Sequence[Path]) -> Finding:
    """Every committed checkpoint is complete, and there is no unfinished one."""
    try:
        for path in found:
            verify(path)
    except CheckpointError as error:
        return Finding("every checkpoint is intact", str(error), False)
    unfinished = [path.name for path in folder.glob("tmp-*")]
    seen = f"{len(found)} intact" + (f", {unfinished[0]} was left" if unfinished else "")
    return Finding("every checkpoint is intact, none is unfinished", seen, bool(found) and not unfinished)


def _status(ended: Ended) -> str:
    return "still running, killed" if ended.status is None else f"exit {ended.status}"
