"""The monitor: a small process on each node that notices when a rank hangs, is stopped or is gone.

A thread of a rank could not do this: it needs the GIL, and stops together with its process. The `watchdog.Watchdog` of
one rank starts the monitor; the other ranks of the node connect to it, see `meeting`. It imports only the standard
library, outlives each of its ranks, and ends with the last one. It checks their heartbeats and the folder of reports.
Once it or another monitor has something to report, it ends its ranks within `Duty.end_seconds`, whatever the file
system does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from ecar_dist.runtime.watchdog.diagnosis import FAILED, GONE, RankReport, diagnose
from ecar_dist.runtime.watchdog.watched import CLEAN, DONE, LAST, Watched, innermost_line, owner
from ecar_dist.storage.atomic import write_json

_POLL_SECONDS = 0.2
VERDICT = "verdict.txt"
MOST_SPEAKERS = 8  # monitors that read the reports of all others and may print the verdict
_MOST_REPORT = 1 << 20  # bytes
_MOST_NAME = 32  # bytes of a rank's number
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # meant for the ranks


@dataclass(frozen=True)
class Duty:
    """The settings that a monitor receives when it starts."""

    size: int  # ranks of the world
    folder: str
    hang_seconds: float
    link: int  # file descriptor of the connection to the rank that started it
    listener: int = -1  # file descriptor to which the node's other ranks connect; -1: it watches one rank
    look_seconds: float = 0.5  # between two checks of the ranks
    folder_seconds: float = 1.0  # between two checks of the folder of reports
    stacks_seconds: float = 2.0  # for the ranks to write their stacks
    gather_seconds: float = 4.0  # for the reports of the other monitors: their check, their stacks, their file
    end_seconds: float = 8.0  # from the first sign of a fault to the end of the ranks

    def has_speaker(self, ranks: list[int]) -> bool:
        """Whether the monitor of these ranks is one of the few, spread evenly, that read all reports and may print."""
        return any(rank % -(-self.size // MOST_SPEAKERS) == 0 for rank in ranks)


class Monitor:
    def __init__(self, duty: Duty) -> None:
        self.duty = duty
        self.folder = Path(duty.folder)
        self.ranks: list[Watched] = []
        self._listener = socket.socket(fileno=duty.listener) if duty.listener >= 0 else None
        self._arriving = [socket.socket(fileno=duty.link)] if duty.link >= 0 else []  # not yet introduced
        self._called = threading.Event()  # another monitor has reported
        self._oom_kills = _oom_kills()
        self._reports: dict[str, list[RankReport]] = {}  # by file name: each file is read once

    def run(self) -> None:
        """Watch the ranks until they end, or until they must be ended."""
        threading.Thread(target=self._wait_for_reports, daemon=True).start()
        if not self._watch():
            return

        # a file system that hangs must not keep the ranks alive
        limit = threading.Timer(self.duty.end_seconds, self._end)
        limit.daemon = True
        limit.start()

        # a rank that prints its own error does not wait for a verdict
        mine = self._report()
        self._answer(FAILED)

        # If every monitor read every report, a fault would cost a million reads on a thousand nodes.
        if any(rank.ending not in (CLEAN, FAILED) for rank in self.ranks):
            speaks = self.duty.has_speaker([rank.rank for rank in self.ranks]) or self._any_is(GONE)
            reports = self._gather(mine) if speaks else self._await_verdict()
            if speaks and not self._all_are(CLEAN):
                self._say(diagnose(reports, self.duty.size, self.duty.folder))
        self._end()

    def _watch(self) -> bool:
        """Watch until there is a fault, or until all ranks have ended cleanly. True if the ranks must be ended."""
        before = time.monotonic()
        while True:
            self._look(self.duty.look_seconds)
            if self._all_are(CLEAN):
                return False

            # Time in which this process did not run is not counted: the job or the host was suspended.
            now = time.monotonic()
            for rank in self.ranks:
                rank.count(min(now - before, 2 * self.duty.look_seconds))
            before = now

            faults = any(rank.ending not in ("", CLEAN) or rank.hangs(self.duty.hang_seconds) for rank in self.ranks)
            if faults or self._called.is_set():
                return True

    def _look(self, seconds: float) -> None:
        """Receive messages from the ranks for at most `seconds`, and note the ranks that are gone."""
        # messages of ranks, and new connections
        links = {rank.link: rank for rank in self.ranks if rank.listening}
        doors = [self._listener] if self._listener else []
        for source in select.select([*links, *self._arriving, *doors], [], [], seconds)[0]:
            if source in links:
                links[source].hear()
            elif source in doors:
                self._arriving.append(source.accept()[0])
            else:
                self._admit(source)

        # ranks that ended without a message
        for rank in self.ranks:
            if not rank.ending and not rank.alive:
                killed = _oom_kills() > self._oom_kills
                rank.miss("the kernel's out-of-memory killer ended a process on this host" if killed else "")
        self._answer(CLEAN)

    def _admit(self, link: socket.socket) -> None:
        """Watch a rank that introduces itself; close any other connection."""
        self._arriving.remove(link)
        with contextlib.suppress(OSError, ValueError):
            text, files, _, _ = socket.recv_fds(link, _MOST_NAME, 2)
            if owner(link)[1] == os.getuid() and len(files) == 2:
                self.ranks.append(Watched(link, int(text), *files))
                return
        link.close()

    def _any_is(self, ending: str) -> bool:
        return any(rank.ending == ending for rank in self.ranks)

    def _all_are(self, *endings: str) -> bool:
        return not self._arriving and all(rank.ending in endings for rank in self.ranks)

    def _answer(self, ending: str) -> None:
        """Answer the ranks with this ending. The last one also waits for the end of this process."""
        word = LAST if self._all_are(CLEAN) else DONE
        for rank in self.ranks:
            if rank.ending == ending:
                rank.answer(word)

    def _wait_for_reports(self) -> None:
        """Runs in its own thread: a file system that hangs must not block `_watch`."""
        while not any(self._report_files()):
            time.sleep(self.duty.folder_seconds)
        self._called.set()

    def _report_files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self.folder.glob("rank*.json")

    def _report(self) -> list[RankReport]:
        """Write what is known about the ranks. Stacks come first, so that a report names only a file that exists."""
        # A rank may have continued since the last check, and the signal that requests its stacks may wake it.
        ranks = sorted(self.ranks, key=lambda rank: rank.rank)
        seen = [(rank.read(), rank.state) for rank in ranks]
        stacks = self._take_stacks(ranks)

        # All stacks of a node are in one file, and all its reports in another.
        path = self.folder / _stem([rank.rank for rank in ranks])
        stacks_path = ""
        with contextlib.suppress(OSError):  # a full disk: the sentence is then only on stderr
            self.folder.mkdir(parents=True, exist_ok=True)
            if stacks:
                path.with_suffix(".stacks.txt").write_text(_together(stacks))
                stacks_path = str(path.with_suffix(".stacks.txt"))

        reports = [
            RankReport(
                rank=rank.rank,
                host=os.uname().nodename,
                process=rank.process,
                kind=rank.kind(self.duty.hang_seconds),
                phase=heartbeat.phase,
                step=heartbeat.step,
                beat=heartbeat.beat,
                seconds=rank.seconds_in(heartbeat),
                state="" if rank.ending == GONE else state,
                words=rank.words,
                stacks=stacks_path if rank.rank in stacks else "",
                innermost=innermost_line(stacks.get(rank.rank, "")),
            )
            for rank, (heartbeat, state) in zip(ranks, seen, strict=True)
            if rank.ending != CLEAN
        ]
        with contextlib.suppress(OSError):
            write_json(path.with_suffix(".json"), [asdict(report) for report in reports])
        return reports

    def _take_stacks(self, ranks: list[Watched]) -> dict[int, str]:
        """The stacks of the ranks that can write them, by rank. Empty if a rank prints its own error instead."""
        if self._any_is(FAILED):
            return {}
        asked = [rank for rank in ranks if rank.ask_for_stacks()]

        # Meanwhile a rank may turn out to be gone: the message of a rank that lost the connection to it may come first.
        until = time.monotonic() + self.duty.stacks_seconds
        waiting = asked
        while waiting and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            self._look(0)
            waiting = [rank for rank in waiting if not (rank.has_written() or rank.ending)]
        return {rank.rank: text for rank in asked if (text := rank.stacks())}

    def _gather(self, mine: list[RankReport]) -> list[RankReport]:
        """The reports of all ranks, or those that arrive within `gather_seconds`.

        If a rank failed and prints its own error, the others have the same time to end by themselves.
        """
        until = time.monotonic() + self.duty.gather_seconds
        while True:
            reports = self._read_reports(mine)
            ended = all(rank.ending for rank in self.ranks)
            everyone = len(reports) == self.duty.size and (ended or all(one.kind != FAILED for one in reports))
            if everyone or self._all_are(CLEAN, FAILED) or time.monotonic() > until:
                return reports
            self._look(_POLL_SECONDS)

    def _await_verdict(self) -> list[RankReport]:
        """Wait as long as `_gather` would: for the verdict of another monitor, or for the end of the ranks."""
        until = time.monotonic() + self.duty.gather_seconds
        while not (all(rank.ending for rank in self.ranks) or time.monotonic() > until):
            if (self.folder / VERDICT).exists():
                break
            self._look(_POLL_SECONDS)
        return []

    def _read_reports(self, mine: list[RankReport]) -> list[RankReport]:
        reports = {report.rank: report for report in mine}
        for path in self._report_files():
            found = self._reports.get(path.name) or read_reports(path, self.duty.size)
            if found:
                self._reports[path.name] = found
            for report in found:
                reports.setdefault(report.rank, report)
        return [reports[rank] for rank in sorted(reports)]

    def _say(self, sentence: str | None) -> None:
        """Print the sentence, unless another monitor was first."""
        if sentence is None:
            return
        try:
            with open(self.folder / VERDICT, "x") as file:
                file.write(sentence + "\n")
        except FileExistsError:
            return
        except OSError:
            pass  # better printed by several monitors than by none
        with contextlib.suppress(OSError):
            os.write(2, f"ecar-dist: {sentence}\n".encode())

    def _end(self) -> NoReturn:
        """End the ranks that are not ending by themselves, and this process."""
        for rank in self.ranks:
            rank.kill()
            rank.answer(LAST)
        os._exit(0)


def read_reports(path: Path, size: int) -> list[RankReport]:
    """The reports of another monitor in a world of `size` ranks; empty for a torn or hostile file.

    Checked by hand: `storage/untrusted.py` needs more than the standard library.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return []
            trees = json.loads(file.read(_MOST_REPORT))
        reports = [RankReport(**tree) for tree in trees]
        if all(_is_known(report, size) for report in reports):
            return reports
    return []


def _is_known(report: RankReport, size: int) -> bool:
    numbers = (report.rank, report.process, report.step, report.beat)
    texts = (report.host, report.kind, report.phase, report.state, report.words, report.stacks, report.innermost)
    known = all(type(number) is int for number in numbers) and all(type(text) is str for text in texts)
    return known and type(report.seconds) in (int, float) and 0 <= report.rank < size


def _stem(ranks: list[int]) -> str:
    """The stem of a node's file names: its first and last rank."""
    return f"rank-{ranks[0]:05d}" if len(ranks) == 1 else f"ranks-{ranks[0]:05d}-{ranks[-1]:05d}"


def _together(stacks: dict[int, str]) -> str:
    return "\n".join(f"rank {rank}:\n{text}" for rank, text in stacks.items())


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
    os._exit(0)  # the thread that reads the folder may hang
