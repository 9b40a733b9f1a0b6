"""The state of a run, in one word and in a sentence, from its record.

Neither Slurm nor the run itself is asked. The run's lock is never tried: a job that starts at that moment would take
the run for occupied. On the host of the run's first rank the process named in the lock file is looked up; from any
other host the age of the last sign of life decides.
"""

from __future__ import annotations

import os

from ecar_dist.cluster.run_record import Attempt, RunRecord, number
from ecar_dist.command_line import EX_FRUITLESS, EX_TEMPFAIL, duration
from ecar_dist.runtime.watchdog.heartbeat import LONGEST_FACTOR

# In the order of a run's life. SILENT: it should be running, and has written nothing for too long.
NOT_STARTED, SUBMITTED, STARTING, RUNNING, SILENT = "not started", "submitted", "starting", "running", "silent"
STOPPED, DONE, FAILED, GAVE_UP, KILLED = "stopped", "done", "failed", "gave up", "killed"
_BY_EXIT_STATUS = {0: DONE, EX_TEMPFAIL: STOPPED, EX_FRUITLESS: GAVE_UP}
_SIGNALLED = 128  # larger exit statuses mean: ended by a signal
_LATER = 30.0  # seconds: an exit status written this long after an attempt's end belongs to another start
_USUAL_HANG_SECONDS = 600.0  # where the config cannot be read, or has no watchdog
_AGAIN = "to continue, requeue the job or run the same command again"

State = tuple[str, str]  # the word, the sentence


def state_of(record: RunRecord, now: float, here: str) -> State:
    """The state of the newest of: the last attempt, a start that is not yet an attempt, a submitted job.

    now: seconds since the epoch.
    here: name of this host.
    """
    last = record.last
    logs = record.logs
    before = ending(last)[0] if last else ""

    # The last attempt has not recorded its end, and nothing has started since.
    if last and last.ended is None and not started_again(record) and not _exited_since(record, last.started):
        before, sentence = _unended(record, last, now, here)
        if before not in (SILENT, KILLED) or not _waits(record):
            return before, sentence

    # A job is in the queue.
    if _waits(record) and record.submitted:
        said = f"job {record.submitted.text}, {duration(now - record.submitted.when)} ago, has not started"
        return SUBMITTED, f"{said}; before that: {before}" if before else said

    # Something has started that has not recorded an attempt.
    if last is None or last.ended is None or started_again(record) or _exited_since(record, last.ended + _LATER):
        return _without_attempt(record, now)

    # The last attempt has recorded its end. It does not know that the job script found it fruitless.
    state, why = ending(last)
    if state == FAILED and logs and (logs.job, logs.status) == (last.job, EX_FRUITLESS):
        state = GAVE_UP
    return state, f"{duration(now - last.ended)} ago{f': {why}' if why else ''}"


def ending(attempt: Attempt) -> State:
    """How an attempt that is over ended, by its own record."""
    if attempt.ended is None:
        return KILLED, "it did not record its end"
    if attempt.reason == "signal":
        return STOPPED, f"by a signal; {_AGAIN}"
    if attempt.reason == "done":
        return DONE, ""
    return GAVE_UP if attempt.reason.startswith(GAVE_UP) else FAILED, attempt.reason.partition(": ")[2]


def started_again(record: RunRecord) -> bool:
    """Whether a job has started its ranks after the last attempt, and they have not recorded their own yet.

    The job script removes exit-status and rank 0 makes it anew, before an attempt is recorded. The comparison includes
    metrics.jsonl because its time comes from the same clock, that of the file system.
    """
    logs = record.logs
    last = record.last
    if logs is None or logs.status is not None or last is None:
        return False
    return logs.status_at > max(last.ended or last.started or 0.0, record.lines_at or 0.0)


def _unended(record: RunRecord, last: Attempt, now: float, here: str) -> State:
    """The state of an attempt that has not recorded its end."""
    job = f"job {last.job} on " if last.job else ""
    where = f"{job}{last.host or 'an unknown host'}, attempt {len(record.attempts)}"
    if record.owner and record.owner.host == here and not _runs(record.owner.process):
        return KILLED, f"{where}, its process {record.owner.process} is gone; {_AGAIN}"

    # Lines of an earlier attempt do not count: at its start an attempt drops those after the step it resumes from.
    resumed_from = last.resumed_from_step
    newest_step = number(record.lines[-1], "step") if record.lines else None
    has_lines = resumed_from is not None and newest_step is not None and newest_step > resumed_from
    silence = max(0.0, now - (_sign_of_life(record) or now))
    if silence > _patience(record, has_lines):
        look = f"`squeue -j {last.job}`" if last.job else f"look for its process on {last.host}"
        return SILENT, f"{where}, silent for {duration(silence)}; to see whether it still runs: {look}"
    if not has_lines:
        return STARTING, f"{where}, for {duration(now - (last.started or now))}"
    return RUNNING, f"{where}, last line {duration(now - (record.lines_at or now))} ago"


def _without_attempt(record: RunRecord, now: float) -> State:
    """The state of a start that has left only logs: Python starts, ranks meet, the preflight runs."""
    logs = record.logs
    if logs and logs.status is not None:
        begun = "" if record.last and record.last.ended is None else " before training began"
        state = _BY_EXIT_STATUS.get(logs.status, KILLED if logs.status >= _SIGNALLED else FAILED)
        when = f"{duration(now - logs.status_at)} ago"
        return state, f"job {logs.job} ended{begun} with status {logs.status}, {when}; see {logs.first_rank}"
    # It has not ended.
    sign = _sign_of_life(record)
    if sign is None:
        return NOT_STARTED, "no attempt is on record"
    state = SILENT if now - sign > _patience(record, False) else STARTING
    who = f"job {logs.job}" if logs else "a process"
    return state, f"{who}, no attempt is on record yet, for {duration(now - sign)}"


def _waits(record: RunRecord) -> bool:
    """Whether a job was submitted, and nothing shows that it has started."""
    job = record.submitted
    started = [one for one in (record.last, record.logs) if one]
    moments = [record.last.started if record.last else None, record.logs.status_at if record.logs else None]
    if job is None or job.text in [one.job for one in started]:
        return False
    return all(moment is None or moment < job.when for moment in moments)


def _exited_since(record: RunRecord, moment: float | None) -> bool:
    """Whether rank 0 of a job has written its exit status after this moment."""
    logs = record.logs
    return logs is not None and logs.status is not None and logs.status_at >= (moment or 0.0)


def _sign_of_life(record: RunRecord) -> float | None:
    """When the last attempt, its job, or a process that has just started last wrote anything."""
    signs = [record.last.started if record.last else None, record.lines_at if record.lines else None]
    if not record.attempts and record.owner:
        signs.append(record.owner.since)
    if record.logs:
        signs += [record.logs.status_at, record.logs.log_at]
    return max((sign for sign in signs if sign is not None), default=None)


def _patience(record: RunRecord, has_lines: bool) -> float:
    """Seconds of silence that are normal: what the watchdog allows. A start may take longer than a step."""
    configured = record.config.train.hang_seconds if record.config else 0.0
    return (configured or _USUAL_HANG_SECONDS) * (1 if has_lines else LONGEST_FACTOR)


def _runs(process: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
