"""The small process beside each rank that sees what the rank cannot: that it is stuck, stopped or gone.

A thread could not: it needs Python's lock, and stops with its process. It is started by `watchdog.Watchdog`, imports
only the standard library, and ends with its rank. It looks at its rank twice a second, and at the folder of reports
once; when it has something to report, or another has, it acts within ENOUGH_SECONDS, whatever the file system does.
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

from ecar_dist.runtime.watchdog.heartbeat import LAYOUT, Place, read_place
from ecar_dist.runtime.watchdog.verdict import CALLED, FAILED, GONE, HUNG, Report, verdict
from ecar_dist.storage.atomic import write_json

CLEAN = "clean"
STACKS_SIGNAL = signal.SIGUSR2
LOOK_SECONDS, FOLDER_SECONDS = 0.5, 1.0
STACKS_SECONDS = 2.0  # for a rank to write down its stacks
GATHER_SECONDS = 4.0  # for the other ranks' reports: their look, their stacks, their file
ENOUGH_SECONDS = 8.0  # from the decision to the end of the rank; another's report is seen within two more
_MOST_STACKS = 1 << 20  # bytes
_MOST_REPORT = 1 << 16
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # they are for the rank


@dataclass(frozen=True)
class Duty:
    """What a monitor is told at its start."""

    rank: int
    size: int
    process: int
    folder: str
    hang_seconds: float
    place_file: int  # descriptors that the rank made and shares
    stacks_file: int


class Monitor:
    def __init__(self, duty: Duty) -> None:
        self.duty, self.folder = duty, Path(duty.folder)
        self._memory = mmap.mmap(duty.place_file, LAYOUT.size, prot=mmap.PROT_READ)
        self._place = self._read()
        self._seconds = 0.0  # in this place, as far as this process looked on
        self._listening, self._ending = True, ""
        self._called = threading.Event()
        self._oom_kills = _oom_kills()

    def run(self) -> None:
        """Until the rank ends, or must."""
        threading.Thread(target=self._wait_for_reports, daemon=True).start()
        kind, words = self._watch()
        if kind == CLEAN:
            return
        limit = threading.Timer(ENOUGH_SECONDS, self._end)  # a file system that hangs must not keep the rank alive
        limit.daemon = True
        limit.start()
        mine = self._report(kind, words)
        if kind != FAILED:
            reports = self._gather(mine)
            if self._ending != CLEAN:
                self._say(verdict(reports, self.duty.size, self.duty.folder))
        self._end()

    def _watch(self) -> tuple[str, str]:
        """Why this comes to an end, and what was said to it."""
        before = time.monotonic()
        while True:
            if said := self._rank_says(LOOK_SECONDS):
                return said
            place, now = self._read(), time.monotonic()
            # Time in which this process did not run is not counted: the whole job was stopped, or the host was.
            self._seconds = 0.0 if place != self._place else self._seconds + min(now - before, 2 * LOOK_SECONDS)
            self._place, before = place, now
            if self._seconds > place.patience(self.duty.hang_seconds):
                return HUNG, ""
            if self._called.is_set():
                return CALLED, ""

    def _read(self) -> Place:
        """The rank may be writing: what is read twice is whole."""
        first = self._memory[:]
        while (second := self._memory[:]) != first:
            first = second
        return read_place(first)

    def _rank_says(self, seconds: float) -> tuple[str, str] | None:
        """Its last word, or GONE; None after so many seconds of silence."""
        readable = select.select([0] if self._listening else [], [], [], seconds)[0]
        if readable:
            text = os.read(0, 1 << 16).decode(errors="replace")
            if text:
                self._ending, _, words = text.partition(" ")
                return self._ending, words
            self._listening = False  # closed: it is about to be gone, or something has closed all its files
        if self._alive():
            return None
        self._ending = GONE
        return GONE, "the kernel's out-of-memory killer struck on this host" if _oom_kills() > self._oom_kills else ""

    def _alive(self) -> bool:
        return os.getppid() == self.duty.process

    def _wait_for_reports(self) -> None:
        """In a thread of its own: a file system that hangs must not stop the look at the rank."""
        while not any(self._report_files()):
            time.sleep(FOLDER_SECONDS)
        self._called.set()

    def _report_files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self.folder.glob("rank-*.json")

    def _report(self, kind: str, words: str) -> Report:
        """Write down what is known of this rank. Its stacks come first: a report names only what is there."""
        place = self._read()  # since the last look it may have gone on; and the signal below may wake it
        state = process_state(self.duty.process) if self._alive() else ""
        stacks = self._take_stacks() if kind in (HUNG, CALLED) and state not in ("", "T", "t") else ""
        path = self.folder / f"rank-{self.duty.rank:05d}"
        written = ""
        with contextlib.suppress(OSError):  # a full disk: the verdict is then on stderr alone
            self.folder.mkdir(parents=True, exist_ok=True)
            if stacks:
                path.with_suffix(".stacks.txt").write_text(stacks)
                written = str(path.with_suffix(".stacks.txt"))
        report = Report(
            rank=self.duty.rank,
            host=os.uname().nodename,
            process=self.duty.process,
            kind=kind,
            phase=place.phase,
            step=place.step,
            beat=place.beat,
            seconds=round(self._seconds, 1) if place == self._place else 0.0,
            state=state,
            words=words,
            stacks=written,
            innermost=innermost_line(stacks),
        )
        with contextlib.suppress(OSError):
            write_json(path.with_suffix(".json"), asdict(report))
        return report

    def _take_stacks(self) -> str:
        """The rank's own, from faulthandler: a signal handler in C, so it needs neither Python's lock nor its turn."""
        start = size = os.fstat(self.duty.stacks_file).st_size  # somebody may have sent the signal before
        until = time.monotonic() + STACKS_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.duty.process, STACKS_SIGNAL)
        while time.monotonic() < until:
            time.sleep(0.2)
            before, size = size, os.fstat(self.duty.stacks_file).st_size
            if start < before == size:
                break
        return os.pread(self.duty.stacks_file, _MOST_STACKS, start).decode(errors="replace")

    def _gather(self, mine: Report) -> list[Report]:
        """The reports of all ranks, or of as many as come in time.

        After a failure that one rank reports itself, the others get that time to end by themselves.
        """
        until = time.monotonic() + GATHER_SECONDS
        while True:
            reports = self._read_reports(mine)
            everyone = len(reports) == self.duty.size and (self._ending or all(one.kind != FAILED for one in reports))
            if everyone or self._ending == CLEAN or time.monotonic() > until:
                return reports
            if self._ending:
                time.sleep(0.2)
            else:
                self._rank_says(0.2)

    def _read_reports(self, mine: Report) -> list[Report]:
        reports = {mine.rank: mine}
        for path in self._report_files():
            if report := read_report(path, self.duty.size):
                reports.setdefault(report.rank, report)
        return [reports[rank] for rank in sorted(reports)]

    def _say(self, sentence: str | None) -> None:
        """On stderr, by the first monitor of all that comes to a verdict."""
        if sentence is None:
            return
        try:
            with open(self.folder / "verdict.txt", "x") as file:
                file.write(sentence + "\n")
        except FileExistsError:
            return
        except OSError:
            pass  # said by several rather than by none
        with contextlib.suppress(OSError):
            os.write(2, f"ecar-dist: {sentence}\n".encode())

    def _end(self) -> NoReturn:
        """The rank's end, unless it is on its way by itself, and this process's."""
        if not self._ending and self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.duty.process, signal.SIGKILL)
        os._exit(0)


def read_report(path: Path, size: int) -> Report | None:
    """Another monitor's report on a rank of `size`; None for what is not one, a torn or hostile file among them.

    By hand: what else reads JSON (`storage/untrusted.py`) needs more than the standard library.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            tree = json.loads(file.read(_MOST_REPORT))
        report = Report(**tree)
        numbers = (report.rank, report.process, report.step, report.beat)
        texts = (report.host, report.kind, report.phase, report.state, report.words, report.stacks, report.innermost)
        known = all(type(number) is int for number in numbers) and all(type(text) is str for text in texts)
        if known and type(report.seconds) in (int, float) and 0 <= report.rank < size:
            return report
    return None


def process_state(process: int) -> str:
    """R, S, D, T, t, Z as in /proc; empty where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def innermost_line(stacks: str) -> str:
    """Where the main thread is: faulthandler writes its threads newest first, and of each the last call first."""
    last = stacks.rpartition("hread 0x")[2].splitlines()
    return last[1].strip() if len(last) > 1 else ""


def _oom_kills() -> int:
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
