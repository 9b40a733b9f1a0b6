"""The state of a run, in one word and in a sentence, from its record: nobody is asked."""

from __future__ import annotations

from ecar_dist.cluster.bounded_read import number
from ecar_dist.cluster.liveness import dead_after, owner_is_gone, sign_of_life, silent_after
from ecar_dist.cluster.run_record import Attempt, RunRecord
from ecar_dist.command_line import EX_FRUITLESS, EX_TEMPFAIL, duration

# In the order of a run's life. SILENT: it should be under way, and has said nothing for too long.
NOT_STARTED, SUBMITTED, STARTING, RUNNING, SILENT = "not started", "submitted", "starting", "running", "silent"
STOPPED, DONE, FAILED, GAVE_UP, KILLED = "stopped", "done", "failed", "gave up", "killed"
_BY_EXIT_STATUS = {0: DONE, EX_TEMPFAIL: STOPPED, EX_FRUITLESS: GAVE_UP}
_SIGNALLED = 128  # statuses from here on are of signals
_LATER = 30.0  # seconds after an attempt's end from which on an exit status is of another start
_AGAIN = "it goes on when the job is requeued, or the command is run again"

State = tuple[str, str]  # the word, the sentence


def state_of(record: RunRecord, now: float, here: str) -> State:
    """What the last attempt left; or what came after it: a job that was submitted, or that has begun."""
    last = record.last
    if last and last.ended is None and not began_again(record) and not _has_exited(record, last.started):
        found = _without_end(record, last, now, here)
        if found[0] != KILLED or not _waits(record):
            return found
    if _waits(record):
        return _submitted(record, now)
    if last is None or last.ended is None or began_again(record) or _has_exited(record, last.ended + _LATER):
        return _without_attempt(record, now)
    state, sentence = ending(last)
    if state == FAILED and record.logs and (record.logs.job, record.logs.status) == (last.job, EX_FRUITLESS):
        state = GAVE_UP
    return state, f"{duration(now - last.ended)} ago{f': {sentence}' if sentence else ''}"


def ending(attempt: Attempt) -> State:
    """How an attempt that is over ended, by its own word."""
    if attempt.ended is None:
        return KILLED, "it left no word of its end"
    if attempt.reason == "signal":
        return STOPPED, f"on a signal; {_AGAIN}"
    if attempt.reason == "done":
        return DONE, ""
    return GAVE_UP if attempt.reason.startswith(GAVE_UP) else FAILED, attempt.reason.partition(": ")[2]


def began_again(record: RunRecord) -> bool:
    """Whether a job has started its ranks after the last attempt, and they have not got so far as to record their own.

    The job script removes the exit status, and rank 0 makes it anew, before an attempt is on record: what is newer than
    the last attempt is of another start. Its lines are compared too: they have the clock of the same file system.
    """
    logs, last = record.logs, record.last
    if logs is None or logs.status is not None or last is None:
        return False
    return (logs.status_at or logs.made) > max(last.ended or last.started or 0.0, record.lines_at or 0.0)


def _without_end(record: RunRecord, last: Attempt, now: float, here: str) -> State:
    """Of an attempt that has not said how it ended: under way, or killed."""
    sign = sign_of_life(record)
    silence = max(0.0, now - sign) if sign is not None else 0.0
    where = (
        f"{f'job {last.job} on ' if last.job else ''}{last.host or 'an unknown host'}, attempt {len(record.attempts)}"
    )
    gone, limit = owner_is_gone(record, here), dead_after(record)
    if gone or (gone is None and limit is not None and silence > limit):
        why = "its process is gone" if gone else f"silent for {duration(silence)}, longer than its watchdog waits"
        return KILLED, f"{where}, {why}; {_AGAIN}"
    if silence > silent_after(record):
        look = f"`squeue -j {last.job}`" if last.job else f"see its process on {last.host}"
        return SILENT, f"{where}, silent for {duration(silence)}; whether it still runs: {look}"
    if not _has_lines(record, last):
        return STARTING, f"{where}, for {duration(now - (last.started or now))}"
    return RUNNING, f"{where}, last line {duration(now - (record.lines_at or now))} ago"


def _submitted(record: RunRecord, now: float) -> State:
    job = record.submitted
    assert job is not None
    before = f"; before that: {ending(record.last)[0]}" if record.last else ""
    return SUBMITTED, f"job {job.text}, {duration(now - job.when)} ago, has not started{before}"


def _without_attempt(record: RunRecord, now: float) -> State:
    """Nothing is on record of the newest start but its logs: Python starts, ranks meet, the preflight runs."""
    logs, owner = record.logs, record.owner
    if logs and logs.status is not None:
        begun = "" if record.last and record.last.ended is None else " before training began"
        state = _BY_EXIT_STATUS.get(logs.status, KILLED if logs.status >= _SIGNALLED else FAILED)
        when = f"{duration(now - (logs.status_at or now))} ago"
        return state, f"job {logs.job} ended{begun} with status {logs.status}, {when}; see {logs.first_rank}"
    if logs is None and owner is None:
        return NOT_STARTED, "no attempt is on record"
    sign = max(moment for moment in (logs and logs.made, owner and owner.since, sign_of_life(record)) if moment)
    state = SILENT if now - sign > silent_after(record) else STARTING
    who = f"job {logs.job}" if logs else "a process"
    return state, f"{who}, no attempt is on record yet, for {duration(now - sign)}"


def _waits(record: RunRecord) -> bool:
    """Whether a job was handed to Slurm, and nothing shows yet that it has begun."""
    job, last = record.submitted, record.last
    if job is None:
        return False
    numbers = [last.job if last else None, *(logs.job for logs in record.job_logs)]
    begun = [last.started if last else None, *(logs.made for logs in record.job_logs)]
    return job.text not in numbers and all(moment is None or moment < job.when for moment in begun)


def _has_exited(record: RunRecord, since: float | None) -> bool:
    """Whether a first rank has written its exit status after this moment."""
    logs = record.logs
    return logs is not None and logs.status is not None and (logs.status_at or 0.0) >= (since or 0.0)


def _has_lines(record: RunRecord, last: Attempt) -> bool:
    """Whether this attempt has made a line: on its start those after the step it goes on from were dropped."""
    return last.resumed and bool(record.lines) and (number(record.lines[-1], "step") or 0) > last.resumed_from_step
