"""Whether a run is under way, as far as its files and this host can tell.

The run's lock is never tried: even a shared flock, held for an instant, could make a job that starts in that instant
take the run for another's. /proc/locks names locks by device and inode, which overlayfs and btrfs number otherwise than
stat does, and says nothing of other hosts. So: on the host of the run's first rank the process in `.lock` is looked up,
and anywhere else the age of the last sign of life counts, against the run's own pace and its watchdog's patience.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from ecar_dist.cluster.bounded_read import number
from ecar_dist.cluster.run_record import Owner, RunRecord
from ecar_dist.runtime.watchdog.heartbeat import LONGEST_FACTOR

SILENT_INTERVALS = 5  # without a line for so many times the usual while, a run is silent,
LEAST_SILENCE = 60.0  # but not for less than so many seconds
_MARGIN = 60.0  # for the watchdog's own work, and for clocks that differ
_USUAL_HANG_SECONDS = 600.0  # where the config cannot be read


def sign_of_life(record: RunRecord) -> float | None:
    """When the last attempt, or its job, last wrote anything that is looked at here."""
    signs = [record.last.started if record.last else None, record.lines_at if record.lines else None]
    if logs := record.logs:
        signs += [logs.status_at, _changed(logs.first_rank)]
    return max((sign for sign in signs if sign is not None), default=None)


def interval(record: RunRecord) -> float | None:
    """The usual seconds between two lines; None where the last attempt has made no two."""
    steps = [number(line, "step") or 0.0 for line in record.lines]
    seconds = [number(line, "perf/step_seconds") for line in record.lines[1:]]
    begun = record.last.resumed_from_step if record.last else 0
    spans = [
        (after - before) * each
        for before, after, each in zip(steps, steps[1:], seconds, strict=False)
        if each is not None and before > begun
    ]
    return statistics.median(spans) if spans else None


def silent_after(record: RunRecord) -> float:
    """Seconds without a sign of life that are worth a word. A start may take as long as the watchdog lets it."""
    if (usual := interval(record)) is None:
        return LONGEST_FACTOR * (_hang_seconds(record) or _USUAL_HANG_SECONDS)
    return max(LEAST_SILENCE, SILENT_INTERVALS * usual)


def dead_after(record: RunRecord) -> float | None:
    """Seconds after which no run is silent and alive: its watchdog would have ended it. None where nothing says so."""
    usual, patience = interval(record), LONGEST_FACTOR * _hang_seconds(record)
    if usual is None or not patience:
        return None
    return max(silent_after(record), usual + patience + _MARGIN)


def owner_is_gone(record: RunRecord, here: str) -> bool | None:
    """Whether the process that last held the run's lock has ended. None on another host than its own."""
    owner = record.owner
    return None if owner is None or owner.host != here else not _is_running(owner)


def _is_running(owner: Owner) -> bool:
    """A process of that number which is not younger than the lock: numbers are given out again."""
    try:
        fields = Path(f"/proc/{owner.process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no such process, one that is hidden, or no Linux
        return _answers(owner.process)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0] != "Z" and began <= owner.since + _MARGIN


def _answers(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _hang_seconds(record: RunRecord) -> float:
    return record.config.train.hang_seconds if record.config else _USUAL_HANG_SECONDS


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
