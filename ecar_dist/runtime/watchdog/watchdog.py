"""A watchdog for every rank: a rank that hangs, is stopped or dies is named, and the job ends instead of stalling.

Each rank records its position (`beat`) in memory that it shares with a small process on its node, the monitor. The
first rank of a node starts the monitor; see `meeting`. If the ranks of a node cannot meet, each has its own. The
monitor ends its ranks, and so the job, in three cases: a rank stays in one phase for longer than hang_seconds (times a
factor, see `heartbeat.PHASES`), a rank is gone without a message, or the monitor of another node reports a fault. Its
findings are in `folder`/`attempt`: ranks-00000-00007.json and .stacks.txt (rank-00003 if it watches one rank), and
verdict.txt, the line that was printed on stderr. A run without a fault writes nothing there.

From the fault (or from the end of hang_seconds) to the end of the last rank it takes at most ten seconds, if all nodes
see a new file within a second. Beyond a thousand nodes it takes three seconds more for each thousand. NFS may take a
minute; the limit of each node applies in any case. A wait for data that lasts longer than hang_seconds is a hang.
hang_seconds=0 turns the watchdog off, for debugging; on systems other than Linux it is always off. If a monitor is
killed, one line reports it and another monitor takes over.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import ecar_dist
from ecar_dist.errors import EcarError
from ecar_dist.runtime.peers import RemoteError, lost_peer
from ecar_dist.runtime.watchdog.diagnosis import FAILED, LOST
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, LONGEST_FACTOR, NO_STEP, PHASE_INDEX
from ecar_dist.runtime.watchdog.meeting import PAUSE_SECONDS, SEARCH_SECONDS, introduce, join, name_for, take
from ecar_dist.runtime.watchdog.monitor import Duty
from ecar_dist.runtime.watchdog.watched import CLEAN, LAST, MOST_WORDS, STACKS_SIGNAL

if TYPE_CHECKING:
    from ecar_dist.runtime.world import World

KEPT_ATTEMPTS = 5  # attempts with reports that are kept
MAX_MONITORS = 3  # that one rank starts: if all of them die, it continues without a monitor
_LOOKUPS_A_SECOND = 1024  # of the folder of reports, by all monitors together
_STOP_GRACE = 2.0  # seconds beyond the monitor's own limit
# The monitor is started with -I and -S: without site-packages and the user's variables it starts in milliseconds. Its
# path is the standard library and, as its first argument, the folder that contains the package ecar_dist.
_FOLDER = Path(ecar_dist.__file__).resolve().parents[1]
_START = f"import sys; sys.path.append(sys.argv[1]); from {Duty.__module__} import main; main()"
_BEFORE_STEPS = ("start", "load")


class Watchdog:
    """A context manager: how the `with` block ends is reported as how the rank ends."""

    def __init__(self, folder: Path, world: World, hang_seconds: float, attempt: str, **seconds: float) -> None:
        """`attempt`: the same on all ranks, and different in every attempt at the run.

        seconds: the limits of the monitor's own work, fields of `Duty`.
        """
        self._memory: mmap.mmap | None = None
        self._link: socket.socket | None = None  # to the monitor
        self._monitor: subprocess.Popen[bytes] | None = None  # if this rank has started it
        self._started = 0  # monitors that this rank has started
        self._changing = threading.Lock()  # guards _link and _monitor
        self._is_closing = False
        self._answer = b""  # the monitor's answer to this rank's final message
        if hang_seconds == 0 or sys.platform != "linux":
            return
        if world.is_first:
            _prune(folder)

        # the memory and the file that the rank shares with its monitor
        self._rank = world.rank
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
            size=world.size,
            folder=str((folder / attempt).absolute()),
            hang_seconds=hang_seconds,
            link=-1,  # these two differ between monitors
            listener=-1,
            **{**_limits(len(set(world.nodes))), **seconds},
        )
        self._find_monitor()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _find_monitor(self) -> None:
        """Join the monitor of this node, or start it. If ranks cannot meet, start one for this rank alone."""
        self._monitor = None
        until = time.monotonic() + SEARCH_SECONDS
        with contextlib.suppress(OSError):  # such names are not supported here, or not permitted
            name = name_for(self._duty.folder)
            while time.monotonic() < until:
                if listener := take(name):
                    with listener:
                        self._start(listener)
                    return
                if (link := join(name)) and introduce(link, self._rank, self._heartbeat, self._stacks):
                    self._link = link
                    return
                time.sleep(PAUSE_SECONDS)
        self._start(None)

    def _start(self, listener: socket.socket | None) -> None:
        """Start a monitor, which other ranks reach through `listener`."""
        self._started += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        shared = {"link": theirs.fileno(), **({"listener": listener.fileno()} if listener else {})}
        with theirs:
            self._monitor = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, str(_FOLDER), json.dumps({**asdict(self._duty), **shared})],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=tuple(shared.values()),
                start_new_session=True,  # signals of the launcher to the rank's process group must not reach it
                cwd="/",
            )
        introduce(ours, self._rank, self._heartbeat, self._stacks)
        self._link = ours

    def _follow(self) -> None:
        """Runs in a thread: wait for the answer to the rank's final message. Replaces a monitor that ends before it."""
        while (link := self._link) is not None:
            answer = b""
            with contextlib.suppress(OSError):  # reset
                answer = link.recv(MOST_WORDS)
            with self._changing:
                if answer or self._is_closing:
                    self._answer = answer
                    return

                ended = self._monitor
                link.close()
                self._link = None
                # A monitor that this rank only joined does not count: it may have been the dying one, whose listener
                # closes after its link.
                if self._started < MAX_MONITORS:
                    with contextlib.suppress(OSError):
                        self._find_monitor()
                replaced = self._link is not None
            self._warn(ended, replaced)

    def _warn(self, ended: subprocess.Popen[bytes] | None, replaced: bool) -> None:
        """Warn that a monitor has ended, if this rank started it or now has no monitor."""
        if ended is None and replaced:
            return
        how = "was lost"
        if ended is not None:
            status = ended.wait()
            how = f"ended with signal {-status}" if status < 0 else f"ended with status {status}"
        outcome = "a new one was started" if replaced else "this rank is no longer watched"
        with contextlib.suppress(OSError):
            os.write(2, f"warning: the watchdog process of rank {self._rank} {how}; {outcome}\n".encode())

    def beat(self, phase: str, step: int) -> None:
        """Record that this rank enters `phase` of `step`. A few stores to memory: no system call, no lock."""
        if self._memory is None:
            return
        self._beat = self._beat + 1 if step == self._step else 0
        self._step = step
        if self._first_step == NO_STEP and phase not in _BEFORE_STEPS:
            self._first_step = step
        LAYOUT.pack_into(self._memory, 0, step, self._beat, PHASE_INDEX[phase], self._first_step)

    def close(self, ending: str = CLEAN) -> bool:
        """Tell the monitor how this rank ends, and wait for its answer; True if it answered that its work is done."""
        with self._changing:
            link = self._link
            if self._is_closing or link is None:
                return False
            self._is_closing = True

        # The final message, and the answer. A monitor that does not answer is of no use to the other ranks either.
        with contextlib.suppress(OSError):
            link.send(ending.encode()[:MOST_WORDS])
        self._follower.join(self._duty.end_seconds + _STOP_GRACE)
        if self._follower.is_alive():
            if self._monitor:
                self._monitor.kill()
            link.shutdown(socket.SHUT_RDWR)
            self._follower.join()
        link.close()

        # wait for the end of a monitor that has nothing left to do
        if self._monitor and self._answer in (LAST, b""):
            self._monitor.wait()
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)
        os.close(self._heartbeat)
        return bool(self._answer)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All ranks raise an EcarError together, and each ends by itself. Any other error is this rank's alone.

        Raises RemoteError in place of an error that only shows that another rank is gone: the monitors name that rank.
        """
        if error is None or isinstance(error, (EcarError, RemoteError)):
            self.close()
        elif words := lost_peer(error):
            if self.close(f"{LOST} {words}"):
                raise RemoteError("the watchdog reports which rank is gone", again=True) from error
        else:
            self.close(FAILED)


def _limits(nodes: int) -> dict[str, float]:
    """The times of `Duty` that depend on the number of nodes: a disk should get at most a thousand lookups a second."""
    looks = max(1.0, nodes / _LOOKUPS_A_SECOND)
    extra = looks - 1.0
    return {"folder_seconds": looks, "gather_seconds": 4.0 + extra, "end_seconds": 8.0 + 2 * extra}


def longest_wait(hang_seconds: float, otherwise: datetime.timedelta) -> datetime.timedelta:
    """The timeout of collectives: longer than the watchdog waits, because only the watchdog can name the rank."""
    return max(otherwise, datetime.timedelta(seconds=hang_seconds * LONGEST_FACTOR + 60))


def _prune(folder: Path) -> None:
    """Remove the oldest reports: they are small, but there may be many attempts."""
    with contextlib.suppress(OSError):
        attempts = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in attempts[: -KEPT_ATTEMPTS + 1]:
            shutil.rmtree(path, ignore_errors=True)
