"""The state of a run, as a word and a sentence, from its record.

Neither Slurm nor the run is contacted. Nothing here takes the run's lock: a job that starts at that moment would find
the run locked. On the host of rank 0, the process named in the lock file is looked up. On other hosts, the time since
the last change of a file decides.
"""

from __future__ import annotations

import enum
import math
import os

from ecar_dist.cluster.run_record import Attempt, RunRecord
from ecar_dist.command_line import EX_FRUITLESS, EX_TEMPFAIL, duration
from ecar_dist.runtime.watchdog.heartbeat import LONGEST_FACTOR


class State(enum.StrEnum):
    """In the order of a run's life."""

    NOT_STARTED = "not started"
    SUBMITTED = "submitted"
    STARTING = "starting"
    RUNNING = "running"
    SILENT = "silent"  # it should be running, but has written nothing for too long
    STOPPED = "stopped"
    DONE = "done"
    FAILED = "failed"
    GAVE_UP = "gave up"
    KILLED = "killed"


_BY_EXIT_STATUS = {0: State.DONE, EX_TEMPFAIL: State.STOPPED, EX_FRUITLESS: State.GAVE_UP}
_SIGNAL_STATUS = 128  # exit statuses from here on: ended by a signal
_NEXT_START = 30.0  # seconds: an exit status written this long after an attempt's end belongs to another start
_USUAL_HANG_SECONDS = 600.0  # if the config cannot be read, or has no watchdog
_CONTINUE = "to continue, requeue the job or run the same command again"


def state_of(record: RunRecord, now: float, here: str) -> tuple[State, str]:
    """The state of the newest of: the last attempt, a start that is not yet an attempt, a submitted job.

    now: seconds since the epoch.
    here: name of this host.
    """
    last = record.last
    logs = record.logs
    before = _ending(last)[0] if last else ""
    exited_at = logs.changed_at if logs and logs.exit_status is not None else -math.inf

    # The last attempt has not recorded its end, and nothing has started or exited since.
    if last and last.ended_at is None and not _started_again(record) and exited_at < last.started_at:
        before, sentence = _unended(record, last, now, here)
        if before not in (State.SILENT, State.KILLED) or not _is_queued(record):
            return before, sentence

    # A job is in the queue.
    if record.submitted and _is_queued(record):
        sentence = f"job {record.submitted.text}, {duration(now - record.submitted.when)} ago, has not started"
        return State.SUBMITTED, f"{sentence}; before that: {before}" if before else sentence

    # A job has started, or exited, without recording an attempt or its end.
    if last is None or last.ended_at is None or _started_again(record) or exited_at >= last.ended_at + _NEXT_START:
        return _without_attempt(record, now)

    # The last attempt has recorded its end. Only its exit status shows that it has failed too often.
    state, why = _ending(last)
    if state == State.FAILED and logs and (logs.job, logs.exit_status) == (last.job, EX_FRUITLESS):
        state = State.GAVE_UP
    ago = f"{duration(now - last.ended_at)} ago"
    return state, f"{ago}: {why}" if why else ago


def _ending(attempt: Attempt) -> tuple[State, str]:
    """How a finished attempt ended, according to its own record."""
    reason = attempt.reason or ""
    if attempt.ended_at is None:
        return State.KILLED, "it did not record its end"
    if reason == "signal":
        return State.STOPPED, f"by a signal; {_CONTINUE}"
    if reason == "done":
        return State.DONE, ""
    return State.GAVE_UP if reason.startswith(State.GAVE_UP) else State.FAILED, reason.partition(": ")[2]


def _started_again(record: RunRecord) -> bool:
    """Whether a job has started its ranks after the last attempt, but they have not recorded an attempt yet.

    Before an attempt is recorded, the job script removes the file exit-status, and rank 0 creates it again. Its time is
    also compared with that of metrics.jsonl, because both come from the clock of the file system.
    """
    logs = record.logs
    last = record.last
    if logs is None or logs.exit_status is not None or last is None:
        return False
    return logs.changed_at > max(last.ended_at or last.started_at, record.lines_at)


def _unended(record: RunRecord, last: Attempt, now: float, here: str) -> tuple[State, str]:
    """The state of an attempt that has not recorded its end."""
    job = f"job {last.job} on " if last.job else ""
    where = f"{job}{last.host or 'an unknown host'}, attempt {len(record.attempts)}"
    if record.owner and record.owner.host == here and not _is_alive(record.owner.process):
        return State.KILLED, f"{where}, its process {record.owner.process} is gone; {_CONTINUE}"

    # The first lines may be from an earlier attempt: this one drops them when it has loaded its checkpoint.
    has_lines = bool(record.lines) and last.start_step is not None and record.lines[-1].step > last.start_step
    silence = now - _last_change(record)
    if silence > _longest_silence(record, has_lines):
        look = f"`squeue -j {last.job}`" if last.job else f"look for its process on {last.host}"
        return State.SILENT, f"{where}, silent for {duration(silence)}; to see whether it still runs: {look}"
    if not has_lines:
        return State.STARTING, f"{where}, for {duration(now - last.started_at)}"
    return State.RUNNING, f"{where}, last line {duration(now - record.lines_at)} ago"


def _without_attempt(record: RunRecord, now: float) -> tuple[State, str]:
    """The state of a start that has left only logs: Python, the rendezvous or the preflight is still running."""
    logs = record.logs
    if logs and logs.exit_status is not None:
        begun = "" if record.last and record.last.ended_at is None else " before training began"
        other = State.KILLED if logs.exit_status >= _SIGNAL_STATUS else State.FAILED
        state = _BY_EXIT_STATUS.get(logs.exit_status, other)
        when = f"{duration(now - logs.changed_at)} ago"
        return state, f"job {logs.job} ended{begun} with status {logs.exit_status}, {when}; see {logs.first_rank}"

    # It has not ended.
    changed_at = _last_change(record)
    if not changed_at:
        return State.NOT_STARTED, "no attempt is on record"
    state = State.SILENT if now - changed_at > _longest_silence(record, False) else State.STARTING
    who = f"job {logs.job}" if logs else "a process"
    return state, f"{who}, no attempt is on record yet, for {duration(now - changed_at)}"


def _is_queued(record: RunRecord) -> bool:
    """Whether a job was submitted, and nothing shows that it has started."""
    job = record.submitted
    if job is None:
        return False
    last = record.last
    logs = record.logs
    started = (last and (last.job == job.text or last.started_at >= job.when)) or (
        logs and (logs.job == job.text or logs.changed_at >= job.when)
    )
    return not started


def _last_change(record: RunRecord) -> float:
    """When the last attempt, its job, or a process that has just started wrote anything; 0 if there is nothing."""
    times = [record.lines_at if record.lines else 0.0]
    if record.last:
        times.append(record.last.started_at)
    elif record.owner:
        times.append(record.owner.since)
    if record.logs:
        times += [record.logs.changed_at, record.logs.log_at]
    return max(times)


def _longest_silence(record: RunRecord, has_lines: bool) -> float:
    """Seconds without a change that are normal: as many as the watchdog allows. A start may take longer than a step."""
    configured = record.config.train.hang_seconds if record.config else 0.0
    return (configured or _USUAL_HANG_SECONDS) * (1 if has_lines else LONGEST_FACTOR)


def _is_alive(process: int) -> bool:
    """Whether a process with this number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
