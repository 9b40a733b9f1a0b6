"""Real ranks under torchrun, which drills observe and send signals to. Processes are found in /proc: Linux only."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MARK = "ECAR_DRILL"
POLL_SECONDS = 0.02
TIDY_SECONDS = 5.0  # time for processes that outlive the launcher to end
_STEP = re.compile(r"^step (\d+)/", re.MULTILINE)
_RANK_STATUS = re.compile(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)")  # in torchrun's report


class UnexpectedError(Exception):
    """The job did not do what the drill waited for."""


@dataclass(frozen=True)
class Ended:
    """How a launch ended. `status` is that of the launcher, None if it had to be killed; `text` is its full log."""

    status: int | None
    text: str
    seconds: float  # since the fault, or since the launch if there was no fault
    orphans: tuple[str, ...] = ()  # processes that outlived the launcher

    @property
    def rank_statuses(self) -> dict[int, int]:
        """Exit status by rank, as torchrun reports it for ranks that failed; a negative one is a signal."""
        return {int(rank): int(status) for rank, status in _RANK_STATUS.findall(self.text)}

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith(beginning)]


class Job:
    """One launch. Every process that it starts inherits a mark in its environment, by which it is found."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, patience: float) -> None:
        self._mark, self._log, self._patience = uuid.uuid4().hex, log, patience
        self._struck = self._began = time.monotonic()
        with log.open("wb") as out:
            self._launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: self._mark},
                start_new_session=True,  # Ctrl-C reaches only the drill, which then ends everything
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._launcher.pid

    def reach(self, step: int) -> None:
        """Wait until this step has been logged."""
        self.wait_for(lambda: any(int(found) >= step for found in _STEP.findall(self.text)), f"step {step}")

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Raises UnexpectedError if the job ends first, or takes too long."""
        while not happened():
            if self._launcher.poll() is not None:
                raise UnexpectedError(f"the job ended before {what}: {last_words(self.text)}")
            if time.monotonic() - self._began > self._patience:
                raise UnexpectedError(f"no {what} within {self._patience:.0f} s: {last_words(self.text)}")
            time.sleep(POLL_SECONDS)

    def strike(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks. `Ended.seconds` counts from here."""
        processes = [self._process_of(rank) for rank in ranks]
        self._struck = time.monotonic()
        for process in processes:
            _send(process, number)

    def hobble(self, rank: int, stopped: float, running: float) -> None:
        """Until the job ends, alternately stop this rank for `stopped` seconds and let it run for `running` seconds."""
        process = self._process_of(rank)
        while self._launcher.poll() is None and time.monotonic() - self._began < self._patience:
            _send(process, signal.SIGSTOP)
            time.sleep(stopped)
            _send(process, signal.SIGCONT)
            time.sleep(running)

    def end(self) -> Ended:
        """Wait for the launcher, then for processes that outlive it. Those that remain are reported and killed."""
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._launcher.wait(max(1.0, self._patience - (time.monotonic() - self._began)))
        seconds = time.monotonic() - self._struck
        if status is None:
            self.kill()
            return Ended(None, self.text, seconds)
        deadline = time.monotonic() + TIDY_SECONDS
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        orphans = tuple(f"{pid} ({_command(pid)})" for pid in left)
        self.kill()
        return Ended(status, self.text, seconds, orphans)

    def kill(self) -> None:
        """Send SIGKILL to all processes with the mark until none is left."""
        while alive := marked(self._mark):
            for pid in alive:
                _send(pid, signal.SIGKILL)
            self._launcher.poll()
            time.sleep(POLL_SECONDS)
        self._launcher.wait()

    def _process_of(self, rank: int) -> int:
        process = self.rank_processes().get(rank)
        if process is None:
            raise UnexpectedError(f"rank {rank} had ended before the fault: {last_words(self.text)}")
        return process

    def rank_processes(self) -> dict[int, int]:
        """Process id by rank: children of the launcher with a rank in their environment."""
        found = {}
        for pid in marked(self._mark):
            rank = re.search(rb"\0RANK=(\d+)\0", _environment(pid))
            if rank and _parent(pid) == self._launcher.pid:
                found[int(rank[1])] = pid
        return found


def torchrun(ranks: int, config: Path, overrides: Sequence[str]) -> list[str]:
    """The command that trains on this number of ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [*launcher, *address, "-m", "ecar_dist", "train", str(config), *overrides]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(text: str) -> str:
    """The line that best explains why a job ended: our last error, else an exception, else the last line."""
    ours = re.findall(r"^ecar-dist: .*", text, re.MULTILINE)
    raised = re.findall(r"^(?:\[rank\d+\]: )?(\w*(?:Error|Exception): .*)", text, re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (ours[-1:] or raised[:1] or lines[-1:] or ["it printed nothing"])[0]


def marked(mark: str) -> list[int]:
    """Live processes whose environment contains the mark. A zombie has no environment."""
    wanted = f"{MARK}={mark}".encode()
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and wanted in _environment(int(entry.name))
    ]


def _environment(pid: int) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return b""


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "already gone"
    return b" ".join(words[:6]).decode(errors="replace")


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
