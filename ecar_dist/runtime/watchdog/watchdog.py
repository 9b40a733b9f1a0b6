"""A watchdog over every rank: a rank that hangs, stops or dies is named, and ends the job instead of stalling it.

Each rank says where it is (`beat`) in memory that it shares with a small process of its own, the monitor. The monitor
ends its rank, and so the job, in three cases: the rank stays in one phase for longer than hang_seconds (times a factor,
see `heartbeat.PHASES`), the rank is gone without a word, or the monitor of another rank reports. What it saw is in
`folder`/`attempt`: rank-00003.json, rank-00003.stacks.txt, and verdict.txt, the one line that was printed on stderr. A
run without a fault writes nothing there.

From the fault (or from the end of hang_seconds) to the end of the last rank it takes at most ten seconds, if all nodes
see a new file within a second. NFS may take a minute; the limit of each rank holds in any case. A wait for data that
lasts longer than hang_seconds is a hang. hang_seconds=0 turns the watchdog off, for a debugger, and so does a system
other than Linux. If a monitor is killed, one line says so and another monitor takes over.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import ecar_dist
from ecar_dist.errors import EcarError
from ecar_dist.runtime.peers import RemoteError, lost_peer
from ecar_dist.runtime.watchdog.diagnosis import FAILED, LOST
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, LONGEST_FACTOR, NO_STEP, PHASE_INDEX
from ecar_dist.runtime.watchdog.monitor import CLEAN, STACKS_SIGNAL, Duty

if TYPE_CHECKING:
    from ecar_dist.runtime.world import World

KEPT_ATTEMPTS = 5  # attempts with reports that are kept
MAX_MONITORS = 3  # of one rank: if they die one after another, it continues without
_STOP_GRACE = 2.0  # seconds beyond the monitor's own limit
# The monitor is started with -I and -S: without site-packages and variables of the user, it starts in milliseconds. Its
# path is the standard library, and the folder that holds the package ecar_dist, which is its first argument.
_FOLDER = Path(ecar_dist.__file__).resolve().parents[1]
_START = f"import sys; sys.path.append(sys.argv[1]); from {Duty.__module__} import main; main()"
_BEFORE_STEPS = ("start", "load")


class Watchdog:
    """Use as a context: how the `with` block ends is how the rank ends."""

    def __init__(self, folder: Path, world: World, hang_seconds: float, attempt: str, **seconds: float) -> None:
        """`attempt` is the same on all ranks, and new in every attempt at the run.

        seconds: the limits of the monitor's own work, fields of `Duty`.
        """
        self._memory: mmap.mmap | None = None
        self._monitor: subprocess.Popen[bytes] | None = None
        self._started = 0  # monitors
        self._changing = threading.Lock()  # of _monitor
        if hang_seconds == 0 or sys.platform != "linux":
            return
        if world.is_first:
            _prune(folder)

        # what the rank shares with its monitor
        self._step = NO_STEP
        self._beat = 0
        self._first_step = NO_STEP
        self._heartbeat = os.memfd_create("heartbeat")
        self._stacks = os.memfd_create("stacks")
        os.ftruncate(self._heartbeat, LAYOUT.size)
        self._memory = mmap.mmap(self._heartbeat, LAYOUT.size)
        self.beat("start", 0)
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)

        self._duty = Duty(
            rank=world.rank,
            size=world.size,
            process=os.getpid(),
            folder=str((folder / attempt).absolute()),
            hang_seconds=hang_seconds,
            heartbeat_file=self._heartbeat,
            stacks_file=self._stacks,
            **seconds,
        )
        self._start()

    def _start(self) -> None:
        """Start a monitor, and a thread that waits for its end."""
        self._monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(_FOLDER), json.dumps(asdict(self._duty))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(self._heartbeat, self._stacks),
            start_new_session=True,  # signals of the launcher to the rank's process group are not for the monitor
            cwd="/",
        )
        self._started += 1
        threading.Thread(target=self._replace, args=(self._monitor,), daemon=True).start()

    def _replace(self, monitor: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a monitor. If this rank did not ask for it, start another one and say so."""
        status = monitor.wait()
        with self._changing:
            if self._monitor is not monitor:
                return
            self._monitor = None
            outcome = "nobody watches this rank any more"
            if self._started < MAX_MONITORS:
                with contextlib.suppress(OSError):
                    self._start()
                    outcome = "another one is started"

        how = f"signal {-status}" if status < 0 else f"status {status}"
        line = f"warning: the watchdog process of rank {self._duty.rank} ended with {how}; {outcome}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())

    def beat(self, phase: str, step: int) -> None:
        """This rank now enters `phase` of `step`. A few stores to memory: no system call, no lock."""
        if self._memory is None:
            return
        self._beat = self._beat + 1 if step == self._step else 0
        self._step = step
        if self._first_step == NO_STEP and phase not in _BEFORE_STEPS:
            self._first_step = step
        LAYOUT.pack_into(self._memory, 0, step, self._beat, PHASE_INDEX[phase], self._first_step)

    def close(self, ending: str = CLEAN) -> bool:
        """Tell the monitor how this rank ends, and wait for it; True once it has done all that is to be done."""
        with self._changing:
            monitor = self._monitor
            self._monitor = None
        if monitor is None:
            return False

        # its last word, and the end of the monitor
        assert monitor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            monitor.stdin.write(ending.encode())
            monitor.stdin.close()
        try:
            status = monitor.wait(self._duty.end_seconds + _STOP_GRACE)
        except subprocess.TimeoutExpired:
            monitor.kill()
            status = monitor.wait()

        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)
        os.close(self._heartbeat)
        return status == 0

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All ranks meet an EcarError together, and each ends by itself. Any other error is this rank's alone.

        Raises RemoteError instead of an error that only says that another rank is gone: the monitors say which.
        """
        if error is None or isinstance(error, (EcarError, RemoteError)):
            self.close()
        elif words := lost_peer(error):
            if self.close(f"{LOST} {words}"):
                raise RemoteError("the watchdog says which rank is gone", again=True) from error
        else:
            self.close(FAILED)


def longest_wait(hang_seconds: float, otherwise: datetime.timedelta) -> datetime.timedelta:
    """The timeout of collectives: longer than the watchdog waits, because the watchdog can name the rank."""
    return max(otherwise, datetime.timedelta(seconds=hang_seconds * LONGEST_FACTOR + 60))


def _prune(folder: Path) -> None:
    """Remove the oldest reports: they are small, but there may be many attempts."""
    with contextlib.suppress(OSError):
        attempts = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in attempts[: -KEPT_ATTEMPTS + 1]:
            shutil.rmtree(path, ignore_errors=True)
