"""A watchdog over every rank: one that hangs, stops or dies is named, and ends the job instead of stalling it.

Each rank says where it is (`beat`) in memory that it shares with a small process of its own, `watchdog_monitor`. That
process ends the job when its rank stays in one phase for longer than hang_seconds (times a factor, see PHASES in
`watchdog_place`), when its rank is gone without a word, or when another rank's monitor reports. What it saw is then in
`folder`/`attempt`: rank-00003.json, rank-00003.stacks.txt, and verdict.txt, the one line that was said on stderr. In a
run without a fault nothing is written there.

From the fault (or from the end of hang_seconds) to the end of the last rank it takes ten seconds at most, where all
nodes see a new file within a second; NFS may take a minute, and each rank's own limit holds in any case. A wait for
data that lasts longer than hang_seconds is a hang. hang_seconds=0, or a system other than Linux, turns all of it off;
turn it off to attach a debugger. A monitor that is killed is said in one line, and another takes its place.
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

from ecar_dist.errors import EcarError
from ecar_dist.runtime.peers import RemoteError, lost_peer
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, LONGEST_FACTOR, NO_STEP, PHASE_INDEX
from ecar_dist.runtime.watchdog.monitor import CLEAN, ENOUGH_SECONDS, STACKS_SIGNAL, Duty
from ecar_dist.runtime.watchdog.verdict import FAILED, LOST

if TYPE_CHECKING:
    from ecar_dist.runtime.world import World

KEPT_ATTEMPTS = 5  # attempts whose reports are kept
MOST_MONITORS = 3  # of one rank: where they die one after another, it goes on without
# No site-packages, no variables of the user: it starts in milliseconds, and finds this package and the library only.
_START = "import sys; sys.path.append(sys.argv[1]); from ecar_dist.runtime.watchdog.monitor import main; main()"
_BEFORE_STEPS = ("start", "load")


class Watchdog:
    """Use as a context: how the `with` block ends is how the rank ends."""

    def __init__(self, folder: Path, world: World, hang_seconds: float, attempt: str) -> None:
        """`attempt` is the same on all ranks, and new in every attempt at the run."""
        self._memory: mmap.mmap | None = None
        self._monitor: subprocess.Popen[bytes] | None = None
        self._started, self._changing = 0, threading.Lock()  # of _monitor
        if hang_seconds == 0 or sys.platform != "linux":
            return
        if world.is_first:
            _prune(folder)
        self._step, self._beat, self._first_step = NO_STEP, 0, NO_STEP
        self._place, self._stacks = (os.memfd_create(name) for name in ("place", "stacks"))
        os.ftruncate(self._place, LAYOUT.size)
        self._memory = mmap.mmap(self._place, LAYOUT.size)
        self.beat("start", 0)
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)
        reports = (folder / attempt).absolute()
        self._duty = Duty(world.rank, world.size, os.getpid(), str(reports), hang_seconds, self._place, self._stacks)
        self._start()

    def _start(self) -> None:
        """Start a monitor, and a thread that waits for its end."""
        here = Path(__file__).resolve().parents[3]
        self._monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(here), json.dumps(asdict(self._duty))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(self._place, self._stacks),
            start_new_session=True,  # the launcher's signals to the rank's process group are not for it
            cwd="/",
        )
        self._started += 1
        threading.Thread(target=self._replace, args=(self._monitor,), daemon=True).start()

    def _replace(self, monitor: subprocess.Popen[bytes]) -> None:
        """Once a monitor is gone that this rank has not dismissed: start another, and say so."""
        status = monitor.wait()
        with self._changing:
            if self._monitor is not monitor:
                return
            self._monitor = None
            then = "nobody watches this rank any more"
            if self._started < MOST_MONITORS:
                with contextlib.suppress(OSError):
                    self._start()
                    then = "another one is started"
        with contextlib.suppress(OSError):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            os.write(2, f"warning: the watchdog process of rank {self._duty.rank} ended with {how}; {then}\n".encode())

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
        """Tell the monitor that this rank now ends, and how; True once it has done all that is to be done about it."""
        with self._changing:
            monitor, self._monitor = self._monitor, None
        if monitor is None:
            return False
        assert monitor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            monitor.stdin.write(ending.encode())
            monitor.stdin.close()
        try:
            status = monitor.wait(ENOUGH_SECONDS + 2)
        except subprocess.TimeoutExpired:
            monitor.kill()
            status = monitor.wait()
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)
        os.close(self._place)
        return status == 0

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An EcarError is met by all ranks together, and each ends by itself; any other error is this rank's alone.

        Raises RemoteError in place of an error that only says that another rank is gone: the monitors say which.
        """
        if error is None or isinstance(error, (EcarError, RemoteError)):
            self.close()
        elif words := lost_peer(error):
            if self.close(f"{LOST} {words}"):
                raise RemoteError("the watchdog says which rank is gone", again=True) from error
        else:
            self.close(FAILED)


def longest_wait(hang_seconds: float, otherwise: datetime.timedelta) -> datetime.timedelta:
    """For the time-out of collectives: the watchdog, which can name the rank, shall be the first to lose patience."""
    return max(otherwise, datetime.timedelta(seconds=hang_seconds * LONGEST_FACTOR + 60))


def _prune(folder: Path) -> None:
    """The reports of earlier attempts are small, but there may be many attempts."""
    with contextlib.suppress(OSError):
        attempts = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in attempts[: -KEPT_ATTEMPTS + 1]:
            shutil.rmtree(path, ignore_errors=True)
