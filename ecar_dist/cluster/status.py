"""How a run is: its state, progress, checkpoints and last problem, from its files alone."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.cluster.run_record import Note, RunRecord, number, read_run_record
from ecar_dist.cluster.run_state import SUBMITTED, ending, started_again, state_of
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.checkpoint.files import MARKER, committed, step_of
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, local_path

AVERAGED = 5  # lines over which the rate and the data wait are averaged
_SECOND = 1.0  # times in lineage.json are rounded down to a second


@dataclass(frozen=True)
class RunProgress:
    """None: the files do not say."""

    step: int
    last_step: int | None
    samples_seen: int
    total_samples: int | None
    samples_per_second: float | None
    seconds_left: float | None
    loss: float | None
    data_wait: float | None  # fraction of the time


@dataclass(frozen=True)
class CheckpointSummary:
    """A bucket is not asked: then `step` is what the last attempt found there at its start."""

    place: str
    asked: bool
    kept: int = 0
    step: int | None = None
    age: float | None = None  # seconds
    steps_since: int | None = None
    failed_saves: int = 0  # in the last attempt


@dataclass(frozen=True)
class Problem:
    age: float  # seconds
    text: str


@dataclass(frozen=True)
class RunStatus:
    """What `ecar-dist status` knows of one run."""

    run: str
    state: str  # a word of run_state.py
    sentence: str
    job: str | None
    host: str | None
    progress: RunProgress
    checkpoints: CheckpointSummary
    attempts: dict[str, int]  # how they ended -> how many
    problem: Problem | None
    log: str | None
    tensorboard: str
    unread: tuple[str, ...]


def run_status(run: Path, now: float | None = None, here: str | None = None) -> RunStatus:
    """Read the status of a run.

    Args:
        run: the run directory.
        now: seconds since the epoch; default: the current time.
        here: name of this host; default: its own.

    Raises ConfigError where `run` is not a run directory.
    """
    now = now or time.time()
    here = here or socket.gethostname()

    # Read the files.
    record = read_run_record(run)
    if not (record.attempts or record.config or record.submitted or record.owner or record.logs or record.unread):
        raise ConfigError(f"{run} is not a run directory; give one: <run.dir>/<run.name> of its config")
    last = record.last
    logs = record.logs

    # Judge them.
    state, sentence = state_of(record, now, here)
    progress = run_progress(record)
    job = logs.job if logs else last.job if last else None
    if record.submitted and state == SUBMITTED:
        job = record.submitted.text

    # The log to read first: that of rank 0, or what the job script printed.
    candidates = (logs.first_rank, logs.folder.with_suffix(".log")) if logs else ()
    log = next((str(path) for path in candidates if path.exists()), None)
    return RunStatus(
        run=str(run),
        state=state,
        sentence=sentence,
        job=job,
        host=last.host if last else None,
        progress=progress,
        checkpoints=checkpoint_summary(record, progress.step, now),
        attempts=_endings(record, state),
        problem=last_problem(record, now),
        log=log,
        tensorboard=str(record.directory.tensorboard),
        unread=tuple(record.unread),
    )


def run_progress(record: RunRecord) -> RunProgress:
    """Step, rate and time left, from the last lines of metrics.jsonl."""
    line: dict[str, Any] = record.lines[-1] if record.lines else {}
    step = int(number(line, "step") or 0)
    seen = int(number(line, "samples_seen") or 0)

    # The first line of an attempt has no rate.
    recent = [one for one in record.lines if number(one, "perf/samples_per_second")][-AVERAGED:]
    rate = _mean(recent, "perf/samples_per_second")

    # The config says where the run ends.
    total, samples_left, last_step = None, None, None
    if config := record.config:
        total = config.train.total_samples
        samples_left = max(0, total - seen)
        last_step = step + math.ceil(samples_left / config.batch.global_batch_size)
    return RunProgress(
        step=step,
        last_step=last_step,
        samples_seen=seen,
        total_samples=total,
        samples_per_second=rate,
        seconds_left=samples_left / rate if rate and samples_left is not None else None,
        loss=number(line, "train/loss"),
        data_wait=_mean(recent, "perf/data_wait_fraction"),
    )


def checkpoint_summary(record: RunRecord, step: int, now: float) -> CheckpointSummary:
    """The newest committed checkpoint. A bucket is not asked: a login node may lack the keys, and it may be slow."""
    config = record.config
    last = record.last
    failed = int(number(record.lines[-1], "checkpoint/failures") or 0) if record.lines else 0
    where = str(record.directory.checkpoints)  # not the recorded one: the run directory may have been moved
    if config and config.checkpoint.dir:
        where = (last.checkpoints if last else "") or join(config.checkpoint.dir, config.run.name)
    if is_remote(where):
        known = last.newest_step if last else None
        return CheckpointSummary(redact(where), asked=False, step=known, failed_saves=failed)

    found = committed(local_path(where))
    if not found:
        return CheckpointSummary(where, asked=True, failed_saves=failed)
    newest = step_of(found[0].name)
    try:
        age = now - (found[0] / MARKER).stat().st_mtime
    except OSError:  # removed in the meantime
        age = None
    return CheckpointSummary(where, True, len(found), newest, age, max(0, step - newest), failed)


def last_problem(record: RunRecord, now: float) -> Problem | None:
    """The newest thing that went wrong, whatever followed it."""
    notes = list(record.problems)
    for attempt in record.attempts:
        if attempt.ended is not None and attempt.reason not in ("", "done", "signal"):
            notes.append(Note(attempt.ended + _SECOND, attempt.reason))  # after its cause, despite the rounding
    newest = max(notes, key=lambda note: note.when, default=None)
    return Problem(max(0.0, now - newest.when), newest.text) if newest else None


def _endings(record: RunRecord, state: str) -> dict[str, int]:
    """How many attempts ended how. The last one, if it has not ended, counts as the state of the run."""
    found = [ending(attempt)[0] for attempt in record.attempts]
    if record.last and record.last.ended is None and state != SUBMITTED and not started_again(record):
        found[-1] = state
    return dict(Counter(found))


def _mean(lines: list[dict[str, Any]], tag: str) -> float | None:
    values = [value for line in lines if (value := number(line, tag)) is not None]
    return sum(values) / len(values) if values else None
