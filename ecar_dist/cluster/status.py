"""`ecar-dist status`: state, progress, checkpoint and last problem of a run, from its files alone, and as text."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecar_dist.cluster.run_record import RunRecord, read_run_record
from ecar_dist.cluster.run_state import State, state_of
from ecar_dist.command_line import columns, counted, duration
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.checkpoint.files import MARKER, committed, step_of
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, local_path
from ecar_dist.storage.untrusted import printable

AVERAGED = 5  # lines over which the rate and the data wait are averaged
_LABEL = 12  # columns
_HEAD = ("run", "state", "step", "%", "samples/s", "left", "loss", "validation", "checkpoint", "last problem")
_LEFT_ALIGNED = (0, 1, 9)


@dataclass(frozen=True)
class RunProgress:
    """A value is None if the files do not contain it."""

    step: int
    last_step: int | None
    samples_seen: int
    total_samples: int | None
    samples_per_second: float | None
    seconds_left: float | None
    loss: float | None
    data_wait: float | None  # fraction of the time
    validation: float | None = None  # the newest one: of the weights,
    validation_ema: float | None = None  # and of their EMA


@dataclass(frozen=True)
class CheckpointSummary:
    """The newest committed checkpoint. A bucket is not contacted: it may be slow, or a login node may lack the keys."""

    storage: str
    contacted: bool  # False: `step` is what the last attempt found at its start
    step: int | None
    failed_saves: int  # in the last attempt
    age: float | None = None  # seconds
    kept: int = 0


@dataclass(frozen=True)
class Problem:
    age: float  # seconds
    text: str


@dataclass(frozen=True)
class RunStatus:
    run: str
    state: State
    sentence: str
    job: str | None
    progress: RunProgress
    checkpoints: CheckpointSummary
    problem: Problem | None
    log: str | None  # to be read first
    unread: tuple[str, ...]


def run_status(run: Path, now: float | None = None, here: str | None = None) -> RunStatus:
    """Read the status of a run.

    Args:
        run: the run directory.
        now: seconds since the epoch; default: the current time.
        here: name of this host; default: its own.

    Raises ConfigError if `run` is not a run directory.
    """
    now = now or time.time()
    here = here or socket.gethostname()

    # Read the files.
    record = read_run_record(run)
    if not (record.attempts or record.config or record.submitted or record.owner or record.logs or record.unread):
        raise ConfigError(f"{run} is not a run directory; give one: <run.dir>/<run.name> of its config")
    last = record.last
    logs = record.logs
    state, sentence = state_of(record, now, here)

    # The job that the state is about.
    job = logs.job if logs else last.job if last else None
    if record.submitted and state == State.SUBMITTED:
        job = record.submitted.text

    # The log of rank 0, or else what the job script printed; outside of Slurm the copy of the console.
    candidates = [logs.first_rank, logs.folder.with_suffix(".log")] if logs else []
    if last and last.attempt and not last.job:
        candidates.insert(0, record.directory.logs / f"console-{last.attempt}.log")
    return RunStatus(
        run=str(run),
        state=state,
        sentence=sentence,
        job=job,
        progress=run_progress(record),
        checkpoints=checkpoint_summary(record, now),
        problem=Problem(max(0.0, now - record.problem.when), record.problem.text) if record.problem else None,
        log=next((str(path) for path in candidates if path.exists()), None),
        unread=tuple(record.unread),
    )


def run_progress(record: RunRecord) -> RunProgress:
    """Step, rate and time left, from the last lines of metrics.jsonl."""
    newest = record.lines[-1] if record.lines else None
    step = newest.step if newest else 0
    samples_seen = newest.samples_seen if newest else 0

    # The first line of an attempt has no rate.
    recent = [line for line in record.lines if line.samples_per_second][-AVERAGED:]
    rate = _mean([line.samples_per_second for line in recent])

    # Not every line has a validation loss.
    validated = next((line for line in reversed(record.lines) if line.validation_ema is not None), None)

    # The config says when the run ends.
    total = None
    samples_left = None
    last_step = None
    if config := record.config:
        total = config.train.total_samples
        samples_left = max(0, total - samples_seen)
        last_step = step + math.ceil(samples_left / config.batch.global_batch_size)
    return RunProgress(
        step=step,
        last_step=last_step,
        samples_seen=samples_seen,
        total_samples=total,
        samples_per_second=rate,
        seconds_left=samples_left / rate if rate and samples_left is not None else None,
        loss=newest.loss if newest else None,
        data_wait=_mean([line.data_wait for line in recent]),
        validation=validated.validation if validated else None,
        validation_ema=validated.validation_ema if validated else None,
    )


def checkpoint_summary(record: RunRecord, now: float) -> CheckpointSummary:
    config = record.config
    last = record.last
    failed_saves = int(record.lines[-1].failed_saves or 0) if record.lines else 0

    # In the run directory, which may have been moved, or where the last attempt found checkpoint.dir.
    storage = str(record.directory.checkpoints)
    if config and config.checkpoint.dir:
        recorded = last.checkpoints if last else None
        storage = recorded or join(config.checkpoint.dir, config.run.name)
    if is_remote(storage):
        step = last.newest_step if last else None
        return CheckpointSummary(redact(storage), contacted=False, step=step, failed_saves=failed_saves)

    # A checkpoint may be removed in the meantime.
    found = committed(local_path(storage))
    step = step_of(found[0].name) if found else None
    age = None
    with contextlib.suppress(OSError, IndexError):
        age = now - (found[0] / MARKER).stat().st_mtime
    return CheckpointSummary(storage, True, step, failed_saves, age, len(found))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def status_block(status: RunStatus) -> list[str]:
    """One run: a line for each fact."""
    problem = status.problem
    rows = [
        ("state", f"{status.state}: {status.sentence}"),
        ("progress", _progress_text(status)),
        ("checkpoint", _checkpoint_text(status)),
        ("problem", f"{duration(problem.age)} ago: {problem.text}" if problem else "none on record"),
        ("log", status.log or ""),
        *(("not read", reason) for reason in status.unread),
    ]
    return [printable(status.run), *(f"  {label:{_LABEL}}{printable(text, 500)}" for label, text in rows if text)]


def status_table(found: Sequence[RunStatus | str]) -> list[str]:
    """Several runs: a row for each. A string is the error message of a folder that is not a run."""
    # Facts that are not known are empty cells.
    rows = [_HEAD]
    for status in found:
        if isinstance(status, str):
            continue
        progress = status.progress
        problem = status.problem
        rows.append(
            (
                printable(status.run),
                status.state,
                f"{progress.step:,}",
                _percent(progress) if progress.total_samples else "",
                _rate(progress.samples_per_second) if progress.samples_per_second else "",
                duration(progress.seconds_left) if progress.seconds_left and status.state != State.DONE else "",
                f"{progress.loss:.4f}" if progress.loss is not None else "",
                f"{progress.validation_ema:.4f}" if progress.validation_ema is not None else "",
                f"{status.checkpoints.step:,}" if status.checkpoints.step is not None else "",
                f"{duration(problem.age)} ago: {printable(problem.text, 60)}" if problem else "",
            )
        )

    # Error messages would make the columns too wide.
    return columns(rows, left=_LEFT_ALIGNED) + [status for status in found if isinstance(status, str)]


def _progress_text(status: RunStatus) -> str:
    progress = status.progress
    end = f"/{progress.last_step:,}" if progress.last_step is not None else ""
    facts = [f"step {progress.step:,}{end}"]
    if progress.total_samples:
        facts.append(f"{progress.samples_seen:,} of {progress.total_samples:,} samples ({_percent(progress)}%)")
    if progress.samples_per_second:
        facts.append(f"{_rate(progress.samples_per_second)} samples/s")
    if progress.data_wait is not None:
        facts.append(f"data wait {progress.data_wait:.0%}")
    if progress.seconds_left and status.state != State.DONE:
        facts.append(f"{duration(progress.seconds_left)} left")
    if progress.step:
        facts.append(f"loss {progress.loss:.4f}" if progress.loss is not None else "loss not finite")
    if progress.validation_ema is not None:
        own = f"{progress.validation:.4f}" if progress.validation is not None else "not finite"
        facts.append(f"validation {own} (EMA {progress.validation_ema:.4f})")
    return ", ".join(facts)


def _checkpoint_text(status: RunStatus) -> str:
    found = status.checkpoints
    failed = f"; {counted(found.failed_saves, 'save')} failed in this attempt" if found.failed_saves else ""
    if not found.contacted:
        step = f"step {found.step:,} at the start of the last attempt" if found.step is not None else "none on record"
        return f"{step}; {found.storage} was not contacted: `ecar-dist checkpoint list {status.run}`{failed}"
    if found.step is None:
        return f"none yet in {found.storage}{failed}"
    age = f", {duration(found.age)} ago" if found.age is not None else ""
    behind = max(0, status.progress.step - found.step)
    since = f"; {counted(behind, 'step')} since" if behind else ""
    return f"step {found.step:,}{age}{since}; {found.kept} kept in {found.storage}{failed}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _percent(progress: RunProgress) -> str:
    """Rounded down, so that only a finished run shows 100."""
    return f"{int(1000 * progress.samples_seen / (progress.total_samples or 1)) / 10:.1f}"
