"""The small process beside each rank that sees what the rank itself cannot: that it hangs, is stopped or is gone.

A thread of the rank would not do: it needs Python's lock, and stops together with its process. The monitor is started
by `watchdog.Watchdog`, imports the standard library only, and ends with its rank. It looks at the heartbeat of its rank
and at the folder of reports. Once it has something to report, or another monitor has, it ends its rank within
`Duty.end_seconds`, whatever the file system does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from ecar_dist.runtime.watchdog.diagnosis import CALLED, FAILED, GONE, HUNG, RankReport, diagnose
from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, Heartbeat, read_heartbeat
from ecar_dist.storage.atomic import write_json

CLEAN = "clean"
STACKS_SIGNAL = signal.SIGUSR2
_POLL_SECONDS = 0.2
_MOST_STACKS = 1 << 20  # bytes
_MOST_REPORT = 1 << 16
_MOST_WORDS = 1 << 16
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # they are for the rank


@dataclass(frozen=True)
class Duty:
    """What a monitor is told at its start."""

    rank: int
    size: int
    process: int
    folder: str
    hang_seconds: float
    heartbeat_file: int  # descriptors that the rank opened and shares
    stacks_file: int
    look_seconds: float = 0.5  # between two looks at the rank
    folder_seconds: float = 1.0  # between two looks at the folder of reports
    stacks_seconds: float = 2.0  # for a rank to write its stacks
    gather_seconds: float = 4.0  # for the reports of the other ranks: their look, their stacks, their file
    end_seconds: float = 8.0  # from the first sign of a fault to the end of this rank


class Monitor:
    def __init__(self, duty: Duty) -> None:
        self.duty = duty
        self.folder = Path(duty.folder)
        self._memory = mmap.mmap(duty.heartbeat_file, LAYOUT.size, prot=mmap.PROT_READ)
        self._heartbeat = self._read()
        self._seconds = 0.0  # since that heartbeat, while this process ran
        self._listening = True  # the rank has not closed its end of the pipe
        self._ending = ""  # what the rank said last, or GONE
        self._called = threading.Event()  # another monitor has reported
        self._oom_kills = _oom_kills()

    def run(self) -> None:
        """Watch the rank until it ends, or until it must be ended."""
        threading.Thread(target=self._wait_for_reports, daemon=True).start()
        kind, words = self._watch()
        if kind == CLEAN:
            return

        # a file system that hangs must not keep the rank alive
        limit = threading.Timer(self.duty.end_seconds, self._end)
        limit.daemon = True
        limit.start()

        mine = self._report(kind, words)
        if kind != FAILED:
            reports = self._gather(mine)
            if self._ending != CLEAN:
                self._say(diagnose(reports, self.duty.size, self.duty.folder))
        self._end()

    def _watch(self) -> tuple[str, str]:
        """Why the rank ends or must be ended, and the words that it said about it."""
        before = time.monotonic()
        while True:
            if said := self._rank_says(self.duty.look_seconds):
                return said

            # Time in which this process did not run is not counted: the whole job was suspended, or the host was.
            heartbeat = self._read()
            now = time.monotonic()
            elapsed = min(now - before, 2 * self.duty.look_seconds)
            self._seconds = self._seconds + elapsed if heartbeat == self._heartbeat else 0.0
            self._heartbeat = heartbeat
            before = now

            if self._seconds > heartbeat.limit(self.duty.hang_seconds):
                return HUNG, ""
            if self._called.is_set():
                return CALLED, ""

    def _read(self) -> Heartbeat:
        """The rank may be writing: what reads the same twice is whole."""
        first = self._memory[:]
        while (second := self._memory[:]) != first:
            first = second
        return read_heartbeat(first)

    def _rank_says(self, seconds: float) -> tuple[str, str] | None:
        """How the rank ends, and its words; None if it said nothing for `seconds` and is alive."""
        # its own word
        readable = select.select([0] if self._listening else [], [], [], seconds)[0]
        if readable:
            text = os.read(0, _MOST_WORDS).decode(errors="replace")
            if text:
                self._ending, _, words = text.partition(" ")
                return self._ending, words
            self._listening = False  # closed: it is about to be gone, or something closed all of its files

        # or its silent end
        if self._alive():
            return None
        self._ending = GONE
        killed = _oom_kills() > self._oom_kills
        return GONE, "the kernel's out-of-memory killer struck on this host" if killed else ""

    def _alive(self) -> bool:
        return os.getppid() == self.duty.process

    def _wait_for_reports(self) -> None:
        """In a thread of its own: a file system that hangs must not stop `_watch`."""
        while not any(self._report_files()):
            time.sleep(self.duty.folder_seconds)
        self._called.set()

    def _report_files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self.folder.glob("rank-*.json")

    def _report(self, kind: str, words: str) -> RankReport:
        """Write what is known about this rank: first its stacks, so that a report names only a file that exists."""
        # Since the last look the rank may have continued, and the signal for its stacks may wake it.
        heartbeat = self._read()
        state = process_state(self.duty.process) if self._alive() else ""
        wants_stacks = kind in (HUNG, CALLED) and state not in ("", "T", "t")
        stacks = self._take_stacks() if wants_stacks else ""

        path = self.folder / f"rank-{self.duty.rank:05d}"
        stacks_path = ""
        with contextlib.suppress(OSError):  # a full disk: the sentence is then on stderr alone
            self.folder.mkdir(parents=True, exist_ok=True)
            if stacks:
                path.with_suffix(".stacks.txt").write_text(stacks)
                stacks_path = str(path.with_suffix(".stacks.txt"))

        report = RankReport(
            rank=self.duty.rank,
            host=os.uname().nodename,
            process=self.duty.process,
            kind=kind,
            phase=heartbeat.phase,
            step=heartbeat.step,
            beat=heartbeat.beat,
            seconds=round(self._seconds, 1) if heartbeat == self._heartbeat else 0.0,
            state=state,
            words=words,
            stacks=stacks_path,
            innermost=innermost_line(stacks),
        )
        with contextlib.suppress(OSError):
            write_json(path.with_suffix(".json"), asdict(report))
        return report

    def _take_stacks(self) -> str:
        """The rank's stacks, as faulthandler writes them in a C signal handler, which needs no lock of Python's."""
        start = size = os.fstat(self.duty.stacks_file).st_size  # somebody may have sent the signal before
        until = time.monotonic() + self.duty.stacks_seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.duty.process, STACKS_SIGNAL)

        # the file is whole once it has stopped growing
        while time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            before = size
            size = os.fstat(self.duty.stacks_file).st_size
            if start < before == size:
                break
        return os.pread(self.duty.stacks_file, _MOST_STACKS, start).decode(errors="replace")

    def _gather(self, mine: RankReport) -> list[RankReport]:
        """The reports of all ranks, or of those that come in time.

        If one rank failed and prints its own error, the others get that time to end by themselves.
        """
        until = time.monotonic() + self.duty.gather_seconds
        while True:
            reports = self._read_reports(mine)
            everyone = len(reports) == self.duty.size and (self._ending or all(one.kind != FAILED for one in reports))
            if everyone or self._ending == CLEAN or time.monotonic() > until:
                return reports
            if self._ending:
                time.sleep(_POLL_SECONDS)
            else:
                self._rank_says(_POLL_SECONDS)

    def _read_reports(self, mine: RankReport) -> list[RankReport]:
        reports = {mine.rank: mine}
        for path in self._report_files():
            if report := read_report(path, self.duty.size):
                reports.setdefault(report.rank, report)
        return [reports[rank] for rank in sorted(reports)]

    def _say(self, sentence: str | None) -> None:
        """Print the sentence, unless another monitor was first."""
        if sentence is None:
            return
        try:
            with open(self.folder / "verdict.txt", "x") as file:
                file.write(sentence + "\n")
        except FileExistsError:
            return
        except OSError:
            pass  # better printed by several monitors than by none
        with contextlib.suppress(OSError):
            os.write(2, f"ecar-dist: {sentence}\n".encode())

    def _end(self) -> NoReturn:
        """End the rank, unless it is ending by itself, and this process."""
        if not self._ending and self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.duty.process, signal.SIGKILL)
        os._exit(0)


def read_report(path: Path, size: int) -> RankReport | None:
    """The report of another monitor in a world of `size` ranks; None for a torn or hostile file.

    Checked by hand: `storage/untrusted.py` needs more than the standard library.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            tree = json.loads(file.read(_MOST_REPORT))
        report = RankReport(**tree)
        numbers = (report.rank, report.process, report.step, report.beat)
        texts = (report.host, report.kind, report.phase, report.state, report.words, report.stacks, report.innermost)
        known = all(type(number) is int for number in numbers) and all(type(text) is str for text in texts)
        if known and type(report.seconds) in (int, float) and 0 <= report.rank < size:
            return report
    return None


def process_state(process: int) -> str:
    """R, S, D, T, t, Z as in /proc; empty if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def innermost_line(stacks: str) -> str:
    """Where the main thread is. faulthandler writes the main thread last, and of each thread the last call first."""
    last = stacks.rpartition("hread 0x")[2].splitlines()
    return last[1].strip() if len(last) > 1 else ""


def _oom_kills() -> int:
    """Processes that the out-of-memory killer of this host has ended since it booted."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def main() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Monitor(Duty(**json.loads(sys.argv[-1]))).run()
    sys.stderr.flush()
    os._exit(0)  # the thread that looks at the folder may hang there
