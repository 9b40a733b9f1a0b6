"""What the files of a run say: read within bounds, without torch, also while others write them.

A run directory may be a stranger's, cut short, or just begun. So nothing here raises for what a file holds, a file that
cannot be read is listed in `RunRecord.unread`, and of a long file the end is read.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecar_dist.cluster.bounded_read import last_object, number, objects_at_end, word
from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import EcarError
from ecar_dist.runtime.run.directory import LOCK_NAME, RunDirectory
from ecar_dist.runtime.run.lineage import MAX_LINEAGE_BYTES
from ecar_dist.storage.untrusted import UntrustedError, parse_json, printable, read_plain_file

_OWNER = re.compile(r"process ([1-9]\d{0,8}) on ([^\s,]{1,255})")
_JOB = re.compile(r"\d{1,12}(_\d{1,8})?")
_JOB_LOGS = re.compile(r"job-(\d{1,12})")


@dataclass(frozen=True)
class Attempt:
    """One entry of lineage.json; times in seconds since the epoch."""

    started: float | None
    ended: float | None
    reason: str
    host: str
    job: str | None
    checkpoints: str
    newest_step: int | None
    resumed: bool  # its record has come so far that it says from which step it goes on,
    resumed_from_step: int  # 0 for the start


@dataclass(frozen=True)
class Owner:
    """Who holds, or held, the run directory's lock."""

    process: int
    host: str
    since: float


@dataclass(frozen=True)
class JobLogs:
    """One folder logs/job-ID, as slurm/train.sbatch makes it."""

    job: str
    folder: Path
    made: float  # when something was last made in it
    status: int | None  # what rank 0 wrote at its end
    status_at: float | None  # when it was written, or made empty at the start; None: rank 0 has not begun

    @property
    def first_rank(self) -> Path:
        return self.folder / "rank-00000.log"


@dataclass(frozen=True)
class Note:
    """Something that was written down, and when."""

    when: float
    text: str


@dataclass
class RunRecord:
    """Of one run directory. `lines`: the last of metrics.jsonl, each step once."""

    directory: RunDirectory
    config: RunConfig | None = None
    attempts: list[Attempt] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    lines_at: float | None = None
    owner: Owner | None = None
    submitted: Note | None = None  # the newest job that `submit` has handed to Slurm
    job_logs: list[JobLogs] = field(default_factory=list)  # oldest first
    notes: list[Note] = field(default_factory=list)  # of what went wrong, in no order
    unread: list[str] = field(default_factory=list)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def logs(self) -> JobLogs | None:
        """Of the last attempt's job, or of one that came after it."""
        return self.job_logs[-1] if self.job_logs else None


def read_record(path: Path) -> RunRecord:
    """Everything that the run's files say, but for its checkpoints."""
    record = RunRecord(RunDirectory(path))
    reading = _Reading(record)
    reading.config()
    reading.attempts()
    reading.lines()
    reading.owner()
    reading.jobs()
    reading.notes()
    return record


class _Reading:
    """Fills a record, file by file."""

    def __init__(self, record: RunRecord) -> None:
        self._record, self._path = record, record.directory.path

    def config(self) -> None:
        path = self._record.directory.config
        if not path.exists():  # a run that was only submitted has it with its job
            path = max(self._path.glob("jobs/*/config.yaml"), default=path, key=_number_of_folder)
        if path.exists():
            with self._noting(path):
                self._record.config = load_config(path)

    def attempts(self) -> None:
        path = self._record.directory.lineage
        with self._noting(path):
            entries = parse_json(read_plain_file(path, MAX_LINEAGE_BYTES))
            if not isinstance(entries, list):
                raise UntrustedError(f"it holds a JSON {type(entries).__name__}, not a list of attempts")
            self._record.attempts = [_attempt(entry) for entry in entries if isinstance(entry, dict)]

    def lines(self) -> None:
        path = self._record.directory.metrics
        with self._noting(path):
            by_step = {}
            for line in objects_at_end(path):
                if (step := number(line, "step")) is not None:
                    by_step[step] = line  # of two lines with one step the later counts
            self._record.lines = [by_step[step] for step in sorted(by_step)]
            self._record.lines_at = path.stat().st_mtime
            if not self._record.lines and path.stat().st_size:
                raise ValueError("its end holds no line of a step")

    def owner(self) -> None:
        path = self._path / LOCK_NAME
        with self._noting(path):
            if found := _OWNER.match(word(path)):
                self._record.owner = Owner(int(found[1]), found[2], path.stat().st_mtime)

    def jobs(self) -> None:
        if path := max(self._path.glob("jobs/*/job"), default=None, key=_number_of_folder):
            with self._noting(path):
                if not (job := _JOB.match(word(path))):
                    raise ValueError("it holds no number of a job")
                self._record.submitted = Note(path.stat().st_mtime, job[0])
        found = []
        for folder in self._record.directory.logs.glob("job-*"):
            if folder.is_dir() and (job := _JOB_LOGS.fullmatch(folder.name)):
                with self._noting(folder / "exit-status"):
                    found.append(_job_logs(job[1], folder))
        self._record.job_logs = sorted(found, key=lambda logs: max(logs.made, logs.status_at or 0.0))

    def notes(self) -> None:
        """What went wrong, as others than the attempts have noted it; of each kind the newest."""
        logs = self._record.directory.logs
        self._note(_newest(logs.glob("watchdog/*/verdict.txt")), _verdict)
        self._note(_newest(logs.glob("job-*/bad-nodes")), _unfit)
        self._note(_newest(logs.glob("substituted.rank-*.jsonl")), _substituted)
        self._note(self._path / "bad_steps.jsonl", _bad_step)

    def _note(self, path: Path | None, say: Callable[[Path], str]) -> None:
        if path is None:
            return
        with self._noting(path):
            if text := say(path):
                self._record.notes.append(Note(path.stat().st_mtime, printable(text)))

    @contextlib.contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        """What a file holds, or lacks, is no reason to end; that it is not there is not even worth a word."""
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, RecursionError, EcarError) as error:
            said = error.strerror if isinstance(error, OSError) else None
            self._record.unread.append(f"{path}: {said or printable(str(error), 150) or 'it cannot be read'}")


def _attempt(entry: dict[str, Any]) -> Attempt:
    newest, resumed = number(entry, "newest_step"), number(entry, "resumed_from_step")
    return Attempt(
        started=_moment(entry.get("started")),
        ended=_moment(entry.get("ended")),
        reason=_text(entry.get("reason")),
        host=_text(entry.get("host")),
        job=_text(entry.get("job")) or None,
        checkpoints=_text(entry.get("checkpoints")),
        newest_step=None if newest is None else int(newest),
        resumed="resumed_from_step" in entry,
        resumed_from_step=int(resumed or 0),
    )


def _job_logs(job: str, folder: Path) -> JobLogs:
    path, made = folder / "exit-status", folder.stat().st_mtime
    if not path.exists():
        return JobLogs(job, folder, made, None, None)
    text = word(path)
    return JobLogs(job, folder, made, int(text) if text.isdecimal() else None, path.stat().st_mtime)


def _verdict(path: Path) -> str:
    return word(path).partition("\n")[0]


def _unfit(path: Path) -> str:
    names = ", ".join(word(path).split())
    return f"the preflight found unfit: {names} ({path.parent.name})" if names else ""


def _substituted(path: Path) -> str:
    entry = last_object(path)
    return f"sample {entry.get('sample_id')} was replaced: {_text(entry.get('reason'))}" if entry else ""


def _bad_step(path: Path) -> str:
    if not (entry := last_object(path)):
        return ""
    step, window = number(entry, "step") or 0, entry.get("pass_over")
    if isinstance(window, list) and len(window) == 2:
        return f"step {step:,.0f}: rolled back; steps {window[0]} to {window[1]} are passed over"
    return f"step {step:,.0f} moved no weight: {_text(entry.get('reason'))}"


def _moment(text: Any) -> float | None:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return datetime.datetime.fromisoformat(text).timestamp()
    return None


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""


def _newest(paths: Iterator[Path]) -> Path | None:
    """Of those that hold anything."""
    times = {}
    for path in paths:
        with contextlib.suppress(OSError):
            if (found := path.stat()).st_size:
                times[path] = found.st_mtime
    return max(times, key=times.__getitem__) if times else None


def _number_of_folder(path: Path) -> int:
    """Of jobs/NNN/file; -1 for another name."""
    name = path.parent.name
    return int(name) if name.isdecimal() and len(name) < 10 else -1
