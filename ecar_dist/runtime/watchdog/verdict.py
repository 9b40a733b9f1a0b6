"""Whose fault it is: from the reports of the ranks to one sentence. Standard library only: the monitor imports this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Why a rank reports. HUNG: it stayed too long in one place. GONE: its process ended without a word. FAILED: it met an
# error, and says so itself. LOST: its connection to another rank broke. CALLED: nothing, but another rank reports.
HUNG, GONE, FAILED, LOST, CALLED = "hung", "gone", "failed", "lost", "called"
AGAIN = "the job is ended; run the same command again to go on from the last checkpoint"
_STOPPED_STATES = "Tt"  # by SIGSTOP, by a debugger
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Report:
    """What the monitor of one rank saw."""

    rank: int
    host: str
    process: int
    kind: str
    phase: str
    step: int
    beat: int
    seconds: float  # in this phase, as far as the monitor looked on
    state: str = ""  # of the process, as in /proc: R, S, D, T, t; empty where it is gone
    words: str = ""  # what it, or the kernel, said
    stacks: str = ""  # file, where there is one
    innermost: str = ""  # the main thread's line of the stacks

    @property
    def stopped(self) -> bool:
        return self.state in tuple(_STOPPED_STATES)

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process})"

    @property
    def where(self) -> str:
        return f'phase "{self.phase}" of step {self.step}'


def verdict(reports: Sequence[Report], size: int, folder: str) -> str | None:
    """One sentence on the odd ones out among `size` ranks; None where a rank that failed says it better itself."""
    for kind, sentence in ((GONE, _gone), (FAILED, None)):
        if found := [report for report in reports if report.kind == kind]:
            return sentence and f"{sentence(found)}; {AGAIN}"
    if stopped := [report for report in reports if report.stopped]:
        return f"{_staying(stopped, 'stopped by a signal or a debugger', reports)}; {_stacks(stopped)}; {AGAIN}"
    if not any(report.kind == HUNG for report in reports):
        return f"{_lost(reports)}; {AGAIN}"
    odd = suspects(reports)
    missing = sorted(set(range(size)) - {report.rank for report in reports})
    if missing and len(odd) == len(reports):
        return f"{_named(missing)} gave no sign of life while the others waited in {odd[0].where}; {AGAIN}"
    said = f" ({_named(missing)} gave no sign of life)" if missing else ""
    if len(odd) == len(reports) > 1:
        same = f"{_named([one.rank for one in odd])} have all been in {odd[0].where} for {odd[0].seconds:.0f} s"
        return f"{same}, none is behind: their stacks are in {folder}; {AGAIN}"
    return f"{_staying(odd, '', reports)}{said}: {_stacks(odd)}; {AGAIN}"


def suspects(reports: Sequence[Report]) -> list[Report]:
    """Those that are furthest behind; of several in one place, those that do not wait in a collective as the rest do.

    Where that says nothing, those whose main thread is on another line than most.
    """
    first = min((report.step, report.beat) for report in reports)
    behind = [report for report in reports if (report.step, report.beat) == first]
    if working := [one for one in behind if not any(part in one.innermost for part in _COLLECTIVES)]:
        behind = working
    line, count = Counter(report.innermost for report in behind).most_common(1)[0]
    apart = [report for report in behind if report.innermost != line]
    return apart if apart and count > len(behind) / 2 else behind


def _gone(found: Sequence[Report]) -> str:
    first = found[0]
    words = f" ({first.words})" if first.words else ""
    return f"{_subject(found)} is gone since {first.where}: killed, or crashed{words}"


def _lost(reports: Sequence[Report]) -> str:
    first = next((report for report in reports if report.kind == LOST), reports[0])
    return f"rank {first.rank} lost contact with another rank in {first.where} ({first.words})"


def _staying(odd: Sequence[Report], how: str, reports: Sequence[Report]) -> str:
    first = odd[0]
    others = Counter(
        f'"{one.phase}"' + (f" of step {one.step}" if one.step != first.step else "")
        for one in reports
        if one not in odd and one.kind != GONE
    )
    wait = f" while the others wait in {others.most_common(1)[0][0]}" if others else ""
    state = f"{how} in" if how else "in"
    return f"{_subject(odd)} has been {state} {first.where} for {first.seconds:.0f} s{wait}"


def _stacks(odd: Sequence[Report]) -> str:
    first = odd[0]
    if first.stacks:
        return f"its stacks are in {first.stacks}"
    return f"it gave no stacks (process state {first.state or 'unknown'})"


def _subject(found: Sequence[Report]) -> str:
    others = [report.rank for report in found[1:]]
    return found[0].who + (f", as {_named(others)}," if others else "")


def _named(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 1 and 2`, `ranks 0, 1, 2 and 5 more`."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > 8:
        names[7:] = [f"{len(names) - 7} more"]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
