"""One rank, as the monitor of its node sees it.

Standard library only: the monitor imports this module.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
from pathlib import Path

from ecar_dist.runtime.watchdog.diagnosis import CALLED, GONE, HUNG
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, Heartbeat, read_heartbeat

CLEAN = "clean"
STACKS_SIGNAL = signal.SIGUSR2
MOST_WORDS = 1 << 16  # bytes of a rank's final message
# The answer to a rank, once its monitor has done all its work for it.
DONE = b"done"
LAST = b"last"  # the monitor ends now
_MOST_STACKS = 1 << 20  # bytes
_STOPPED_STATES = ("T", "t")
_ENDED_STATES = ("Z", "X")
_BORN = 19  # index of the process's start time in the fields of /proc/PID/stat after the name
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Watched:
    def __init__(self, link: socket.socket, rank: int, heartbeat_file: int, stacks_file: int) -> None:
        self.link = link
        self.rank = rank
        self.process, _ = owner(link)
        self._born = _stat(self.process)[_BORN:][:1]
        self._stacks_file = stacks_file
        self._memory = mmap.mmap(heartbeat_file, LAYOUT.size, prot=mmap.PROT_READ)
        os.close(heartbeat_file)
        self._heartbeat = self.read()
        self.seconds = 0.0  # since that heartbeat, while the monitor ran
        self.ending = ""  # how the rank ended, by its final message, or GONE
        self.words = ""
        self.listening = True  # the rank has not closed its end of the link
        self._answered = False
        self._stacks_start = 0  # where the requested stacks begin in its file
        self._stacks_end = 0

    def read(self) -> Heartbeat:
        """Read until two reads agree, because the rank may be writing at the same time."""
        first = self._memory[:]
        while (second := self._memory[:]) != first:
            first = second
        return read_heartbeat(first)

    def count(self, elapsed: float) -> None:
        """Add the seconds since the last check, or start over after a beat."""
        heartbeat = self.read()
        self.seconds = self.seconds + elapsed if heartbeat == self._heartbeat else 0.0
        self._heartbeat = heartbeat

    def seconds_in(self, heartbeat: Heartbeat) -> float:
        return round(self.seconds, 1) if heartbeat == self._heartbeat else 0.0

    def hangs(self, hang_seconds: float) -> bool:
        return not self.ending and self.seconds > self._heartbeat.limit(hang_seconds)

    def kind(self, hang_seconds: float) -> str:
        """Why the rank is reported."""
        return self.ending or (HUNG if self.hangs(hang_seconds) else CALLED)

    @property
    def alive(self) -> bool:
        """Its process ID may have been reused by a process that started later."""
        fields = _stat(self.process)
        return bool(fields) and fields[0] not in _ENDED_STATES and fields[_BORN:][:1] == self._born

    @property
    def state(self) -> str:
        return process_state(self.process) if self.alive else ""

    def hear(self) -> None:
        """Receive the rank's final message, if there is one."""
        try:
            text = self.link.recv(MOST_WORDS).decode(errors="replace")
        except OSError:  # reset
            text = ""
        if text and not self.ending:
            self.ending, _, self.words = text.partition(" ")
        elif not text:
            self.listening = False  # closed: the rank is about to end, or something closed all of its files

    def miss(self, words: str) -> None:
        """Mark the rank as gone without a final message. `words`: what is known about the cause."""
        self.ending, self.words = GONE, words

    def answer(self, word: bytes) -> None:
        """Tell the rank, once, that everything it waits for is done."""
        if not self._answered:
            self._answered = True
            with contextlib.suppress(OSError):
                self.link.send(word, socket.MSG_DONTWAIT)

    def ask_for_stacks(self) -> bool:
        """Have faulthandler write the rank's stacks, in a C signal handler without the GIL; False if it cannot."""
        self._stacks_start = self._stacks_end = self._stacks_size()  # somebody may have sent the signal before
        if self.ending or self.state in ("", *_STOPPED_STATES):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, STACKS_SIGNAL)
        return True

    def has_written(self) -> bool:
        """Whether the stacks have stopped growing since the last call: then they are complete."""
        before = self._stacks_end
        self._stacks_end = self._stacks_size()
        return self._stacks_start < before == self._stacks_end

    def stacks(self) -> str:
        """What the rank has written since it was asked."""
        return os.pread(self._stacks_file, _MOST_STACKS, self._stacks_start).decode(errors="replace")

    def _stacks_size(self) -> int:
        return os.fstat(self._stacks_file).st_size

    def kill(self) -> None:
        if not self.ending and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)


def owner(link: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end, as the kernel knows them."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return process, user


def process_state(process: int) -> str:
    """R, S, D, T, t, Z as in /proc; empty if there is no such process."""
    return "".join(_stat(process)[:1])


def innermost_line(stacks: str) -> str:
    """The current line of the main thread. faulthandler writes that thread last, and of each the last call first."""
    last = stacks.rpartition("hread 0x")[2].splitlines()
    return last[1].strip() if len(last) > 1 else ""


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
