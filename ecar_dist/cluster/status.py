"""How a run is: its state, progress, checkpoints, attempts and last problem, from its files alone."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.cluster.bounded_read import number
from ecar_dist.cluster.liveness import interval
from ecar_dist.cluster.run_record import JobLogs, Note, RunRecord, read_record
from ecar_dist.cluster.run_state import RUNNING, STARTING, SUBMITTED, began_again, ending, state_of
from ecar_dist.command_line import counted
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.checkpoint.files import MARKER, committed, step_of
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, local_path
from ecar_dist.train.time_budget import SlowRank, TimeBudget

AVERAGED = 5  # lines whose rates and shares are averaged
_SECOND = 1.0  # times in lineage.json are rounded down to it
TREND_LINES = 20  # whose losses are compared: the newer half with the older


@dataclass(frozen=True)
class Progress:
    """None is what the files do not say. Times in seconds, shares in [0, 1]."""

    step: int
    last_step: int | None
    samples_seen: int
    total_samples: int | None
    samples_per_second: float | None
    seconds_left: float | None
    loss: float | None
    loss_trend: float | None  # mean loss of the last TREND_LINES' newer half over that of the older half, minus 1
    loss_steps: int  # that these lines span
    data_wait: float | None
    verdict: str | None  # on what the time goes into


@dataclass(frozen=True)
class Checkpoints:
    """A bucket is not asked: then `step` is what the last attempt found there at its start."""

    place: str
    asked: bool
    kept: int
    step: int | None
    age: float | None
    steps_since: int | None


@dataclass(frozen=True)
class Problem:
    age: float
    text: str


@dataclass(frozen=True)
class RunStatus:
    """Ages and spans in seconds."""

    run: str
    state: str  # a word of run_state
    sentence: str
    job: str | None
    host: str | None
    progress: Progress
    checkpoints: Checkpoints
    attempts: dict[str, int]  # how they ended -> how many
    training_seconds: float  # at least: how long a killed attempt lasted is not known, unless it is the last
    problem: Problem | None
    log: str | None
    tensorboard: str
    unread: tuple[str, ...]


def run_status(run: Path, now: float | None = None, here: str | None = None) -> RunStatus:
    """`now`: seconds since the epoch; `here`: this host's name. Raises ConfigError where `run` is no run directory."""
    now, here = now or time.time(), here or socket.gethostname()
    record = read_record(run)
    if not (record.attempts or record.config or record.submitted or record.owner or record.logs or record.unread):
        raise ConfigError(f"{run} is not a run directory; give one: <run.dir>/<run.name> of its config")
    state, sentence = state_of(record, now, here)
    progress, last, logs = progress_of(record), record.last, record.logs
    job = logs.job if logs else last.job if last else None
    return RunStatus(
        run=str(run),
        state=state,
        sentence=sentence,
        job=record.submitted.text if record.submitted and state == SUBMITTED else job,
        host=last.host if last else None,
        progress=progress,
        checkpoints=checkpoints_of(record, progress.step, now),
        attempts=_endings(record, state),
        training_seconds=_training_seconds(record, state, now),
        problem=last_problem(record, now),
        log=_log(logs),
        tensorboard=str(record.directory.tensorboard),
        unread=tuple(record.unread),
    )


def _log(logs: JobLogs | None) -> str | None:
    """What to read first: rank 0's story, or else what the job script said."""
    places = (logs.first_rank, logs.folder.with_suffix(".log")) if logs else ()
    return next((str(path) for path in places if path.exists()), None)


def progress_of(record: RunRecord) -> Progress:
    """From the last lines of metrics.jsonl; an attempt's first line has no rates."""
    line: dict[str, Any] = record.lines[-1] if record.lines else {}
    recent = [one for one in record.lines if number(one, "perf/samples_per_second")][-AVERAGED:]
    step, seen = int(number(line, "step") or 0), int(number(line, "samples_seen") or 0)
    compared = record.lines[-TREND_LINES:]
    config, rate = record.config, _mean(recent, "perf/samples_per_second")
    total = config.train.total_samples if config else None
    left = max(0, total - seen) if total is not None else None
    return Progress(
        step=step,
        last_step=step + math.ceil(left / config.batch.global_batch_size) if config and left is not None else None,
        samples_seen=seen,
        total_samples=total,
        samples_per_second=rate,
        seconds_left=left / rate if rate and left is not None else None,
        loss=number(line, "train/loss"),
        loss_trend=_trend(compared),
        loss_steps=step - int(number(compared[0], "step") or 0) if compared else 0,
        data_wait=_mean(recent, "perf/data_wait_fraction"),
        verdict=_verdict(recent),
    )


def checkpoints_of(record: RunRecord, step: int, now: float) -> Checkpoints:
    """A folder is looked at. A bucket is not: that may take long, and keys that a login node lacks."""
    config, last = record.config, record.last
    where = str(record.directory.checkpoints)  # not what is on record: the run directory may have been moved
    if config and config.checkpoint.dir:
        where = (last.checkpoints if last else "") or join(config.checkpoint.dir, config.run.name)
    if is_remote(where):
        return Checkpoints(redact(where), False, 0, last.newest_step if last else None, None, None)
    found = [path for path in committed(local_path(where)) if path.name.removeprefix("step-").isdecimal()]
    if not found:
        return Checkpoints(where, True, 0, None, None, None)
    newest = step_of(found[0].name)
    try:
        age = now - (found[0] / MARKER).stat().st_mtime
    except OSError:  # gone since
        age = None
    return Checkpoints(where, True, len(found), newest, age, max(0, step - newest))


def last_problem(record: RunRecord, now: float) -> Problem | None:
    """The newest thing that went wrong, whatever came of it."""
    notes = [*record.notes, *_failed_saves(record)]
    for attempt in record.attempts:
        if attempt.ended is not None and attempt.reason not in ("", "done", "signal"):
            notes.append(Note(attempt.ended + _SECOND, attempt.reason))  # after what led to it
    newest = max(notes, key=lambda note: note.when, default=None)
    return Problem(max(0.0, now - newest.when), newest.text) if newest else None


def _failed_saves(record: RunRecord) -> list[Note]:
    """Only counted in the lines. When the count rose is reckoned back from the newest line, by the usual pace."""
    counts = [number(line, "checkpoint/failures") or 0.0 for line in record.lines]
    if record.lines_at is None or not counts or not counts[-1]:
        return []
    rose = next((place for place in range(len(counts) - 1, 0, -1) if counts[place - 1] < counts[place]), 0)
    when = record.lines_at - (len(counts) - 1 - rose) * (interval(record) or 0.0)
    return [Note(when, f"{counted(int(counts[-1]), 'checkpoint')} could not be saved in this attempt")]


def _endings(record: RunRecord, state: str) -> dict[str, int]:
    """Of all attempts; one that is under way counts as what the run is."""
    found = [ending(attempt)[0] for attempt in record.attempts]
    if record.last and record.last.ended is None and state != SUBMITTED and not began_again(record):
        found[-1] = state
    return dict(Counter(found))


def _training_seconds(record: RunRecord, state: str, now: float) -> float:
    total = 0.0
    for attempt in record.attempts:
        end = attempt.ended
        if end is None and attempt is record.last:
            end = now if state in (STARTING, RUNNING) and not began_again(record) else record.lines_at
        if attempt.started is not None and end is not None:
            total += max(0.0, end - attempt.started)
    return total


def _mean(lines: list[dict[str, Any]], tag: str) -> float | None:
    values = [value for line in lines if (value := number(line, tag)) is not None]
    return sum(values) / len(values) if values else None


def _trend(lines: list[dict[str, Any]]) -> float | None:
    half = len(lines) // 2
    older, newer = (_mean(some, "train/loss") for some in (lines[:half], lines[half:]))
    return newer / older - 1 if older and newer else None


def _verdict(lines: list[dict[str, Any]]) -> str | None:
    """As the run itself says it, on the mean shares of these lines."""
    if not lines:
        return None
    shares = {tag.removeprefix("time/"): _mean(lines, tag) or 0.0 for tag in lines[-1] if tag.startswith("time/")}
    rank, ratio = (number(lines[-1], f"perf/slowest_{what}") for what in ("rank", "ratio"))
    slow = SlowRank(int(rank), ratio, "") if rank is not None and ratio is not None else None
    budget = TimeBudget(1.0, shares, _mean(lines, "perf/data_wait_fraction") or 0.0, slow)
    return budget.bottleneck().removesuffix(" ()")
