"""All information in the files of a run. Reading them needs no torch, and does not disturb a run that writes them.

A run directory may come from a stranger, be damaged, or have just been created. So nothing here raises because of the
content of a file: files that cannot be read are listed in `RunRecord.unread`. Only the end of a long file is read.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import EcarError
from ecar_dist.runtime.run.directory import GOOD_ENDS, LOCK_NAME, RunDirectory
from ecar_dist.runtime.run.lineage import AttemptEntry, LineageFile
from ecar_dist.storage.untrusted import AnyRecord, JsonLines, parse_record, printable, read_plain_file

TAIL_BYTES = 1 << 18  # read from the end of a JSONL file: at least the last 30 lines of metrics.jsonl
MAX_SHORT_BYTES = 1 << 12  # a job id, an exit status, names of nodes, a diagnosis
MAX_PROBLEMS = 10  # files that are read to find the newest problem
FIRST_RANK_LOG = "rank-00000.log"
_OWNER = re.compile(r"process ([1-9]\d{0,8}) on ([^\s,]{1,255})")
_JOB = re.compile(r"\d{1,12}(_\d{1,8})?")
_JOB_LOGS = re.compile(r"job-(\d{1,12})")

# The bounds keep sums and quotients of these numbers finite.
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Quantity = Annotated[float, Field(ge=0, le=1e15)]
Rate = Annotated[float, Field(ge=1e-9, le=1e15)]


class _Line(BaseModel):
    """Base of the lines of a JSONL file. Keys that are not shown are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class MetricsLine(_Line):
    """A line of metrics.jsonl. Values that were not finite are None."""

    step: Count
    samples_seen: Count
    loss: float | None = Field(None, alias="train/loss")
    samples_per_second: Rate | None = Field(None, alias="perf/samples_per_second")  # not in an attempt's first line
    step_seconds: Quantity | None = Field(None, alias="perf/step_seconds")
    data_wait: Quantity | None = Field(None, alias="perf/data_wait_fraction")
    validation: float | None = Field(None, alias="eval/loss")  # only in lines of steps after which it was computed
    validation_ema: float | None = Field(None, alias="eval/loss_ema")
    failed_saves: Quantity | None = Field(None, alias="checkpoint/failures")


class BadStepLine(_Line):
    """A line of bad_steps.jsonl: a skipped step, or a rollback with the first and last step that it skips."""

    step: Count
    reason: str = ""
    pass_over: tuple[Count, Count] | None = None


class SubstitutionLine(_Line):
    """A line of logs/substituted.rank-NNNNN.jsonl."""

    sample_id: int
    reason: str


class Attempt(AttemptEntry):
    """An entry of lineage.json: one start of training."""

    @property
    def started_at(self) -> float:
        """Seconds since the epoch; 0 if it is not recorded."""
        return datetime.datetime.fromisoformat(self.started).timestamp() if self.started else 0.0

    @property
    def ended_at(self) -> float | None:
        """Seconds since the epoch; None while it runs, and if it was killed."""
        return datetime.datetime.fromisoformat(self.ended).timestamp() if self.ended else None

    @property
    def start_step(self) -> int | None:
        """The step after which it continues; None until its checkpoint is loaded."""
        return (self.resumed_from_step or 0) if "resumed_from_step" in self.model_fields_set else None


@dataclass(frozen=True)
class Owner:
    """The process that holds, or last held, the lock of the run directory."""

    process: int
    host: str
    since: float


@dataclass(frozen=True)
class JobLogs:
    """The folder logs/job-ID that slurm/train.sbatch creates."""

    job: str
    folder: Path
    exit_status: int | None  # None while rank 0 runs, and if it was killed
    changed_at: float  # last change of the file exit-status, or of the folder if there is no such file
    log_at: float  # last change of the log of rank 0; 0 if there is none

    @property
    def first_rank(self) -> Path:
        return self.folder / FIRST_RANK_LOG


@dataclass(frozen=True)
class Note:
    """A fact from a file, and when it was written."""

    when: float
    text: str


@dataclass
class RunRecord:
    """All information in the files of a run directory, except its checkpoints. Times in seconds since the epoch."""

    directory: RunDirectory
    config: RunConfig | None = None
    attempts: list[Attempt] = field(default_factory=list)
    lines: list[MetricsLine] = field(default_factory=list)  # the last lines, each step once, in order
    lines_at: float = 0.0
    owner: Owner | None = None
    submitted: Note | None = None  # the id of the newest job that `ecar-dist submit` submitted
    logs: JobLogs | None = None  # of the newest job
    problem: Note | None = None  # the newest problem, whatever happened after it
    unread: list[str] = field(default_factory=list)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Add to `unread` why a file could not be read. A file that does not exist is fine."""
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EcarError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            self.unread.append(f"{path}: {reason or printable(str(error), 150) or 'it cannot be read'}")


def read_run_record(path: Path) -> RunRecord:
    """Read all files of a run directory. Never raises because of their content."""
    record = RunRecord(RunDirectory(path))
    directory = record.directory

    # The config. A run that was only submitted has it in its job folder.
    config = directory.config
    if not config.exists():
        config = max(path.glob("jobs/*/config.yaml"), default=config, key=_job_folder_number)
    if config.exists():
        with record.reading(config):
            record.config = load_config(config)

    # The attempts. If lineage.json is damaged, those of its copy.
    with record.reading(directory.lineage):
        LineageFile(directory.lineage).read()
    record.attempts = [Attempt.model_validate(entry) for entry in directory.attempts()]

    # The metrics. If a step was logged twice, the later line counts.
    with record.reading(directory.metrics):
        by_step = {line.step: line for line in _last_lines(directory.metrics, MetricsLine)}
        record.lines = [by_step[step] for step in sorted(by_step)]
        record.lines_at = _changed_at(directory.metrics)
        if not record.lines and directory.metrics.stat().st_size:
            raise ValueError("no line of a step at its end")

    # The process that holds the run directory.
    lock = path / LOCK_NAME
    with record.reading(lock):
        if owner := _OWNER.match(_short_text(lock)):
            record.owner = Owner(int(owner[1]), owner[2], _changed_at(lock))

    # The newest job that was submitted.
    if job_file := max(path.glob("jobs/*/job"), default=None, key=_job_folder_number):
        with record.reading(job_file):
            if not (job := _JOB.match(_short_text(job_file))):
                raise ValueError("no job id in it")
            record.submitted = Note(_changed_at(job_file), job[0])

    record.logs = _newest_logs(record)
    record.problem = _newest_problem(record)
    return record


def _newest_logs(record: RunRecord) -> JobLogs | None:
    """The logs of the job that started last."""
    found = []
    for folder in record.directory.logs.glob("job-*"):
        name = _JOB_LOGS.fullmatch(folder.name)
        if name is None or not folder.is_dir():
            continue

        # The file is empty while rank 0 runs. The job script removes it before a start.
        status = folder / "exit-status"
        with record.reading(status):
            text = _short_text(status) if status.exists() else ""
            exit_status = int(text) if text.isdecimal() else None
            changed_at = _changed_at(status) or _changed_at(folder)
            found.append(JobLogs(name[1], folder, exit_status, changed_at, _changed_at(folder / FIRST_RANK_LOG)))
    return max(found, default=None, key=lambda logs: logs.changed_at)


def _newest_problem(record: RunRecord) -> Note | None:
    # An attempt that failed. Its time is rounded down to a second, and must not be before that of its cause.
    newest = None
    for attempt in record.attempts:
        if attempt.ended_at is not None and attempt.reason and attempt.reason not in GOOD_ENDS:
            newest = Note(attempt.ended_at + 1.0, printable(attempt.reason))

    # Problems in other files.
    found = []
    for pattern, describe in _PROBLEMS.items():
        for path in record.directory.path.glob(pattern):
            with contextlib.suppress(OSError):
                if path.stat().st_size:
                    found.append((_changed_at(path), path, describe))
    found.sort(key=lambda one: one[0], reverse=True)
    for when, path, describe in found[:MAX_PROBLEMS]:
        if newest and newest.when > when:
            break
        with record.reading(path):
            if text := describe(path):
                return Note(when, printable(text))
    return newest


def _watchdog_verdict(path: Path) -> str:
    return _short_text(path).partition("\n")[0]


def _unfit_nodes(path: Path) -> str:
    names = ", ".join(_short_text(path).split())
    return f"the preflight found unfit nodes: {names} ({path.parent.name})" if names else ""


def _replaced_sample(path: Path) -> str:
    lines = _last_lines(path, SubstitutionLine)
    return f"sample {lines[-1].sample_id} was replaced: {lines[-1].reason}" if lines else ""


def _bad_step(path: Path) -> str:
    lines = _last_lines(path, BadStepLine)
    if not lines:
        return ""
    last = lines[-1]
    if last.pass_over:
        return f"step {last.step:,}: rolled back; steps {last.pass_over[0]} to {last.pass_over[1]} are skipped"
    return f"step {last.step:,} was skipped: {last.reason}"


_PROBLEMS: dict[str, Callable[[Path], str]] = {  # pattern of files in the run directory -> how they are described
    "logs/watchdog/*/verdict.txt": _watchdog_verdict,
    "logs/job-*/bad-nodes": _unfit_nodes,
    "logs/substituted.rank-*.jsonl": _replaced_sample,
    "bad_steps.jsonl": _bad_step,
}


def _last_lines(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """The last lines of a JSONL file, oldest first, without damaged ones. Raises UntrustedError and OSError."""
    with JsonLines(path, partial(parse_record, model=kind), tail=TAIL_BYTES) as lines:
        return list(lines)


def _short_text(path: Path) -> str:
    """Raises UntrustedError and OSError."""
    return read_plain_file(path, MAX_SHORT_BYTES).decode(errors="replace").strip()


def _changed_at(path: Path) -> float:
    """Seconds since the epoch; 0 if there is nothing at the path."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _job_folder_number(path: Path) -> int:
    """NNN of jobs/NNN/file; -1 for another name."""
    name = path.parent.name
    return int(name) if name.isdecimal() and len(name) < 10 else -1
