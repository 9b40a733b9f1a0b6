"""The run directory: config.yaml, lineage.json, metrics.jsonl, bad_steps.jsonl; tb/, logs/, checkpoints/, jobs/ ...

Code for a single process: only rank 0 calls it. Does not import torch, so that a command that only reads a run starts
fast.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from ecar_dist import __version__
from ecar_dist.config.read import config_to_yaml, load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError, FruitlessError, NodeError, reason_of
from ecar_dist.runtime.run.lineage import MAX_REASON, LineageFile
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX, atomic_write, naming, set_aside
from ecar_dist.storage.node_lock import is_open_as, try_lock
from ecar_dist.storage.untrusted import UntrustedError, printable

LOCK_NAME = ".lock"
BEFORE_THE_START = ("jobs", "logs")  # a job script writes there before the run begins
_WITH_KEY = re.compile(r"://\S*[?@]")  # a signature, or a user's name and password
GOOD_ENDS = ("done", "signal")
MAX_FRUITLESS = 3  # attempts of one job that are cut short before they save anything
# The wait for an earlier attempt of the same job: its node was lost and it has not noticed yet, or the file system
# has not noticed yet that it is dead (NFS gives a silent client 90 s by default).
LOCK_SECONDS = 120.0
_LOCK_POLL = 0.5
_MAX_OWNER_BYTES = 1024  # of the line in the lock file that names its owner


class RunDirectory:
    """The paths of one run. Reading needs only the path; `open_for_training` claims the directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.lineage = self.path / "lineage.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.samples = self.path / "samples"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.ema_snapshots = self.path / "ema"

        self.record_lost = False  # on opening, lineage.json and its copy were both damaged
        self._record = LineageFile(self.lineage)
        self._lock: BinaryIO | None = None
        self._attempt: str | None = None
        self._written: list[dict[str, Any]] = []  # the attempts that this process last wrote to lineage.json
        self._written_file: BinaryIO | None = None  # kept open, so that its inode is not reused

    def preview(self, step: int) -> Path:
        """The path of the picture of a step."""
        return self.samples / f"step-{step:08d}.png"

    def open_for_training(self) -> None:
        """Create the directory, or take over the one that an earlier attempt left. Call on rank 0 only.

        It belongs to this process until the process ends. A damaged lineage.json is set aside and replaced by its copy;
        if the copy is damaged too, `record_lost` is set. Raises ConfigError if the directory contains something that is
        not a run, or if another process is training there.
        """
        # refuse a directory that is not ours, before anything is written
        ours = (TEMPORARY_SUFFIX, LOCK_NAME)
        found = [path for path in self.path.glob("*") if path.name not in BEFORE_THE_START]
        if not self._record.exists() and any(not path.name.endswith(ours) for path in found):
            raise ConfigError(
                f"{self.path} is not empty and contains no run (no lineage.json); choose another run.name or run.dir"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(self.path)
        self._hold()

        # lineage.json first: if the start is interrupted after it, the next start finds a run here
        self.record_lost = not self._record.repair()
        self._write(self._record.read())
        for folder in (self.logs, self.checkpoints):
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError:
                raise ConfigError(f"{folder} is not a folder; move it away, the run keeps its files there") from None

    def _hold(self) -> None:
        """Lock the directory. The kernel releases the lock when its owner ends; the file names the owner."""
        if self._lock is not None:
            return
        file = _open_lock(self.path / LOCK_NAME)
        try:
            _lock(file, self.path)
        except OSError as error:
            print(f"{self.path} cannot be locked ({reason_of(error)}): make sure that no second job trains there")
        with naming(self.path / LOCK_NAME):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}{_slurm_job()}\n".encode())
        self._lock = file

    def attempts(self) -> list[dict[str, Any]]:
        """Oldest first. If lineage.json is damaged, those of its copy, or those that this process wrote."""
        return self._record.known() or list(self._written)

    @property
    def run_id(self) -> str:
        """The name of the first attempt; a run directory that is moved or copied keeps it."""
        first = self.attempts()[0]
        return str(first.get("run") or first["attempt"])

    def begin_attempt(self, **facts: Any) -> str:
        """Append this start to lineage.json, with the versions and `facts`; returns its name. Call on rank 0 only.

        The fact `run` is the name of the run, for a record that has lost it.
        Raises FruitlessError if the job was restarted MAX_FRUITLESS times and `facts["newest_step"]` never rose.
        """
        self._attempt = uuid.uuid4().hex[:8]
        attempt = {
            "attempt": self._attempt,
            "started": _now(),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "chain": os.environ.get("SLURM_ARRAY_JOB_ID"),  # an array whose tasks run one after another
            "ecar_dist": __version__,
            "torch": importlib.metadata.version("torch"),
            "python": platform.python_version(),
            **facts,
        }
        attempts = [*self.attempts(), attempt]
        self._write(attempts)
        _refuse_fruitless(attempts)
        return self._attempt

    def note_attempt(self, **facts: Any) -> None:
        """Add to the entry of this attempt in lineage.json. Does nothing in a process that has begun no attempt."""
        if self._attempt is None:
            return
        try:
            attempts = self._record.read() or list(self._written)
        except (UntrustedError, OSError):
            if not self.is_ours():
                return
            self._record.repair()
            attempts = list(self._written)
        for attempt in attempts:
            if attempt.get("attempt") == self._attempt:
                attempt.update(facts)
        self._write(attempts)

    def end_attempt(self, reason: str) -> None:
        """Record how this attempt ended: one of GOOD_ENDS, or the error. An attempt without a reason was killed."""
        self.note_attempt(ended=_now(), reason=reason[:MAX_REASON])

    def is_ours(self) -> bool:
        """Whether no later attempt has begun here: a process that was suspended and replaced must not write any more.

        A later attempt always writes a new file. So a damaged lineage.json is ours if it is still the file that we
        wrote. If there is no file, the lock that we hold decides.
        """
        if not self._attempt:
            return False
        try:
            attempts = self._record.read()
            if attempts or os.path.lexists(self.lineage):
                return bool(attempts) and attempts[-1].get("attempt") == self._attempt
            return self._holds_the_lock()
        except (UntrustedError, OSError):
            return is_open_as(self._written_file, self.lineage)

    def _holds_the_lock(self) -> bool:
        """Whether the lock file is still the one that this process has locked."""
        return is_open_as(self._lock, self.path / LOCK_NAME)

    def _write(self, attempts: list[dict[str, Any]]) -> None:
        self._record.write(attempts)
        self._written = attempts
        if self._written_file is not None:
            self._written_file.close()
        self._written_file = self.lineage.open("rb")

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved config of the run, readable only by its owner if a URL has a key. Call on rank 0 only."""
        text = config_to_yaml(config)
        if self.config.is_dir():  # a rename replaces everything else, but not a folder
            set_aside(self.config)
        with atomic_write(self.config) as file:
            if _WITH_KEY.search(text):
                os.fchmod(file.fileno(), 0o600)
            file.write(text.encode())

    def load_config(self) -> RunConfig:
        """The resolved config of the run. Raises ConfigError if this is not a run directory."""
        if not self.config.exists():
            raise ConfigError(f"{self.path} contains no config.yaml; give a run directory, or an export made from one")
        return load_config(self.config)


def _open_lock(path: Path) -> BinaryIO:
    """The lock file of a run. Raises ConfigError for anything but a regular file, and for a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fix = "make sure that nobody trains there, and remove it"
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened ({reason_of(error)}); {fix}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ConfigError(f"{path} is not a regular file; {fix}")
    return open(handle, "ab+", buffering=0)


def _refuse_strangers(path: Path) -> None:
    """Raises ConfigError if others could place a link here for us to write through."""
    found = path.stat()
    parent = path.absolute().parent.stat()
    by_all = bool(found.st_mode & stat.S_IWOTH)
    strange = found.st_uid != os.getuid() and bool(parent.st_mode & stat.S_IWOTH)
    if by_all or strange:
        what = "everybody may write to it" if by_all else "another user made it, where everybody may write"
        raise ConfigError(f"{path} is not safe to write to: {what}; `chmod o-w` it, or choose another run.dir")


def _lock(file: BinaryIO, path: Path) -> None:
    """Take the lock; wait at most LOCK_SECONDS for an earlier attempt of the same Slurm job.

    Raises ConfigError if another job has it, NodeError after that time, OSError if locks are not supported.
    """
    until = None
    while not try_lock(file):
        file.seek(0)
        owner = printable(file.read(_MAX_OWNER_BYTES).decode(errors="replace").strip()) or "another process"
        if not _slurm_job() or not owner.endswith(_slurm_job()):
            raise ConfigError(f"{owner} is training in {path}; wait for its end, or choose another run.name")

        if until is None:
            until = time.monotonic() + LOCK_SECONDS
            print(f"{owner}, an earlier attempt, still holds {path}; waiting {LOCK_SECONDS:g} s at most", flush=True)
        elif time.monotonic() > until:
            raise NodeError(f"{owner}, an earlier attempt, does not release {path}; run the same command again")
        time.sleep(_LOCK_POLL)


def _slurm_job() -> str:
    """The end of the line in the lock file, the same for all attempts of one job; empty outside Slurm.

    The tasks of an array that run one after another have different job numbers, but count as one job.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return f", Slurm job {job}" if job else ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _refuse_fruitless(attempts: list[dict[str, Any]]) -> None:
    """Raises FruitlessError if the last attempts of this Slurm job all ended early at the same newest checkpoint.

    Only attempts of one job, or one chain of jobs, count: a user who starts again by hand may have fixed the cause.
    """
    now = attempts[-1]
    earlier = attempts[-1 - MAX_FRUITLESS : -1]
    job = _submitted_as(now)
    step = now.get("newest_step")
    fruitless = [
        one
        for one in earlier
        if _submitted_as(one) == job and one.get("newest_step") == step and one.get("reason") not in GOOD_ENDS
    ]
    if job and len(fruitless) == MAX_FRUITLESS:
        raise FruitlessError(
            f"job {job} was cut short {MAX_FRUITLESS} times in a row without a new checkpoint after step {step or 0}; "
            f"see logs/ for the cause, then submit it as a new job"
        )


def _submitted_as(attempt: dict[str, Any]) -> str | None:
    return attempt.get("chain") or attempt.get("job")
