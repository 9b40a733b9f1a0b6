"""What the files of a run say: read within bounds, without torch, also while others write them.

A run directory may be a stranger's, cut short, or just begun. So nothing here raises for the content of a file: what
cannot be read is listed in `RunRecord.unread`, and of a long file only the end is read.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import EcarError
from ecar_dist.runtime.run.directory import LOCK_NAME, RunDirectory
from ecar_dist.runtime.run.lineage import MAX_LINEAGE_BYTES
from ecar_dist.storage.untrusted import (
    JsonLines,
    UntrustedError,
    parse_json,
    parse_object,
    printable,
    read_plain_file,
)

TAIL_BYTES = 1 << 18  # read of a file of lines: at least the last 30 lines of metrics.jsonl
MAX_WORD_BYTES = 1 << 12  # of a short file: a job id, an exit status, names of nodes, a diagnosis
FIRST_RANK_LOG = "rank-00000.log"
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
    resumed_from_step: int | None  # 0: from the start; None: the attempt has not yet come so far


@dataclass(frozen=True)
class Owner:
    """The process that holds, or last held, the lock of the run directory."""

    process: int
    host: str
    since: float


@dataclass(frozen=True)
class JobLogs:
    """The folder logs/job-ID that slurm/train.sbatch makes."""

    job: str
    folder: Path
    status: int | None  # what rank 0 wrote at its end
    status_at: float  # last change of exit-status, which is empty while rank 0 runs; of the folder where there is none
    log_at: float | None  # last change of the log of rank 0

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
    """Everything that the files of one run directory say, except its checkpoints."""

    directory: RunDirectory
    config: RunConfig | None = None
    attempts: list[Attempt] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)  # the last of metrics.jsonl, each step once, rising
    lines_at: float | None = None
    owner: Owner | None = None
    submitted: Note | None = None  # id of the newest job that `ecar-dist submit` started
    logs: JobLogs | None = None  # of the newest job
    problems: list[Note] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Collect in `unread` why a file could not be read. A file that does not exist is no problem."""
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, RecursionError, EcarError) as error:
            said = error.strerror if isinstance(error, OSError) else None
            self.unread.append(f"{path}: {said or printable(str(error), 150) or 'it cannot be read'}")


def read_run_record(path: Path) -> RunRecord:
    """Read all files of a run directory. Raises nothing for their content."""
    record = RunRecord(RunDirectory(path))
    directory = record.directory

    # The config. A run that was only submitted has it in the folder of its job.
    config = directory.config
    if not config.exists():
        config = max(path.glob("jobs/*/config.yaml"), default=config, key=_job_folder_number)
    if config.exists():
        with record.reading(config):
            record.config = load_config(config)

    # The attempts: one each time training was started.
    with record.reading(directory.lineage):
        entries = parse_json(read_plain_file(directory.lineage, MAX_LINEAGE_BYTES))
        if not isinstance(entries, list):
            raise UntrustedError(f"it holds a JSON {type(entries).__name__}, not a list of attempts")
        record.attempts = [_attempt(entry) for entry in entries if isinstance(entry, dict)]

    # The metrics. A step that is logged twice counts as the later line.
    with record.reading(directory.metrics):
        by_step = {number(line, "step"): line for line in objects_at_end(directory.metrics)}
        record.lines = [by_step[step] for step in sorted(step for step in by_step if step is not None)]
        record.lines_at = directory.metrics.stat().st_mtime
        if not record.lines and directory.metrics.stat().st_size:
            raise ValueError("its end holds no line of a step")

    # The process that holds the run directory.
    lock = path / LOCK_NAME
    with record.reading(lock):
        if owner := _OWNER.match(short_text(lock)):
            record.owner = Owner(int(owner[1]), owner[2], lock.stat().st_mtime)

    _read_jobs(record)
    _read_problems(record)
    return record


def _read_jobs(record: RunRecord) -> None:
    # The newest job that was submitted.
    if path := max(record.directory.path.glob("jobs/*/job"), default=None, key=_job_folder_number):
        with record.reading(path):
            if not (job := _JOB.match(short_text(path))):
                raise ValueError("it holds no job id")
            record.submitted = Note(path.stat().st_mtime, job[0])

    # The logs of the job that started last.
    found = []
    for folder in record.directory.logs.glob("job-*"):
        if folder.is_dir() and (name := _JOB_LOGS.fullmatch(folder.name)):
            with record.reading(folder / "exit-status"):
                found.append(_job_logs(name[1], folder))
    record.logs = max(found, default=None, key=lambda logs: logs.status_at)


def _job_logs(job: str, folder: Path) -> JobLogs:
    status = folder / "exit-status"
    text = short_text(status) if status.exists() else ""
    return JobLogs(
        job=job,
        folder=folder,
        status=int(text) if text.isdecimal() else None,
        status_at=_changed(status) or folder.stat().st_mtime,
        log_at=_changed(folder / FIRST_RANK_LOG),
    )


def _read_problems(record: RunRecord) -> None:
    """Problems that are written outside lineage.json: of each kind the newest."""
    logs = record.directory.logs
    kinds: list[tuple[Path | None, Callable[[Path], str]]] = [
        (_newest(logs.glob("watchdog/*/verdict.txt")), lambda path: short_text(path).partition("\n")[0]),
        (_newest(logs.glob("job-*/bad-nodes")), _unfit_nodes),
        (_newest(logs.glob("substituted.rank-*.jsonl")), _replaced_sample),
        (record.directory.path / "bad_steps.jsonl", _bad_step),
    ]
    for path, describe in kinds:
        if path is not None:
            with record.reading(path):
                if text := describe(path):
                    record.problems.append(Note(path.stat().st_mtime, printable(text)))


def _unfit_nodes(path: Path) -> str:
    names = ", ".join(short_text(path).split())
    return f"the preflight found unfit nodes: {names} ({path.parent.name})" if names else ""


def _replaced_sample(path: Path) -> str:
    entries = objects_at_end(path)
    return f"sample {entries[-1].get('sample_id')} was replaced: {_text(entries[-1].get('reason'))}" if entries else ""


def _bad_step(path: Path) -> str:
    if not (entries := objects_at_end(path)):
        return ""
    step = number(entries[-1], "step") or 0
    skipped = entries[-1].get("pass_over")
    if isinstance(skipped, list) and len(skipped) == 2:
        return f"step {step:,.0f}: rolled back; steps {skipped[0]} to {skipped[1]} are skipped"
    return f"step {step:,.0f} was skipped: {_text(entries[-1].get('reason'))}"


def _attempt(entry: dict[str, Any]) -> Attempt:
    newest = number(entry, "newest_step")
    resumed_from = int(number(entry, "resumed_from_step") or 0)
    return Attempt(
        started=_moment(entry.get("started")),
        ended=_moment(entry.get("ended")),
        reason=_text(entry.get("reason")),
        host=_text(entry.get("host")),
        job=_text(entry.get("job")) or None,
        checkpoints=_text(entry.get("checkpoints")),
        newest_step=None if newest is None else int(newest),
        resumed_from_step=resumed_from if "resumed_from_step" in entry else None,
    )


def objects_at_end(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the last lines of a file, oldest first. Raises UntrustedError and OSError."""
    with JsonLines(path, parse_object, tail=TAIL_BYTES) as lines:
        return list(lines)


def short_text(path: Path) -> str:
    """The text of a short file. Raises UntrustedError and OSError."""
    return read_plain_file(path, MAX_WORD_BYTES).decode(errors="replace").strip()


def number(tree: dict[str, Any], name: str) -> float | None:
    """A finite number of a JSON object; None for any other value."""
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _moment(text: Any) -> float | None:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return datetime.datetime.fromisoformat(text).timestamp()
    return None


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""


def _changed(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None


def _newest(paths: Iterator[Path]) -> Path | None:
    """The newest file that is not empty."""
    times = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_size:
                times[path] = found.st_mtime
    return max(times, key=times.__getitem__) if times else None


def _job_folder_number(path: Path) -> int:
    """NNN of jobs/NNN/file; -1 for another name."""
    name = path.parent.name
    return int(name) if name.isdecimal() and len(name) < 10 else -1
