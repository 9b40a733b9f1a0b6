"""Finds the rank at fault: turns the reports of all ranks into one sentence.

Standard library only: the monitor imports this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Why a monitor reports a rank.
HUNG = "hung"  # it stayed in one phase for too long
GONE = "gone"  # its process ended without reporting it
FAILED = "failed"  # it raised an error, and prints it itself
LOST = "lost"  # its connection to another rank broke
CALLED = "called"  # nothing is wrong with it, but another rank was reported

AGAIN = "the job is ended; run the same command again to continue from the last checkpoint"
_STOPPED_STATES = ("T", "t")  # by SIGSTOP, by a debugger
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_MOST_NAMED = 8  # ranks in one sentence


@dataclass(frozen=True)
class RankReport:
    """What a monitor saw of one rank."""

    rank: int
    host: str
    process: int
    kind: str
    phase: str
    step: int
    beat: int
    seconds: float  # in this phase, while the monitor watched
    state: str = ""  # of the process, as in /proc: R, S, D, T, t; empty if it is gone
    words: str = ""  # details: the transport's error, or a note on the out-of-memory killer
    stacks: str = ""  # path of the file with its stacks; empty if there is none
    innermost: str = ""  # innermost line of the main thread's stack

    @property
    def stopped(self) -> bool:
        return self.state in _STOPPED_STATES

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process})"

    @property
    def where(self) -> str:
        return f'phase "{self.phase}" of step {self.step}'


def diagnose(reports: Sequence[RankReport], size: int, folder: str) -> str | None:
    """One sentence about the ranks at fault among `size` ranks; None if a rank failed, because it prints its own error.

    The causes are checked in order of certainty: a rank is gone, it failed, it was stopped, it lost a connection, it
    hangs.
    """
    # a rank that ended
    if gone := [report for report in reports if report.kind == GONE]:
        first = gone[0]
        words = f" ({first.words})" if first.words else ""
        return f"{_subject(gone)} has been gone since {first.where}: killed or crashed{words}; {AGAIN}"
    if any(report.kind == FAILED for report in reports):
        return None

    # a rank that is stopped, or one with a broken connection
    if stopped := [report for report in reports if report.stopped]:
        return f"{_staying(stopped, 'stopped by a signal or a debugger', reports)}; {_stacks(stopped)}; {AGAIN}"
    if not any(report.kind == HUNG for report in reports):
        first = next((report for report in reports if report.kind == LOST), reports[0])
        return f"rank {first.rank} lost contact with another rank in {first.where} ({first.words}); {AGAIN}"

    # a hang
    odd = suspects(reports)
    missing = sorted(set(range(size)) - {report.rank for report in reports})
    if missing and len(odd) == len(reports):
        return f"{_named(missing)} gave no sign of life while the others waited in {odd[0].where}; {AGAIN}"
    silent = f" ({_named(missing)} gave no sign of life)" if missing else ""
    if len(odd) == len(reports) > 1:
        same = f"{_named([one.rank for one in odd])} have all been in {odd[0].where} for {odd[0].seconds:.0f} s"
        return f"{same}, and none is behind: their stacks are in {folder}; {AGAIN}"
    return f"{_staying(odd, '', reports)}{silent}: {_stacks(odd)}; {AGAIN}"


def suspects(reports: Sequence[RankReport]) -> list[RankReport]:
    """The ranks that the others wait for.

    Those furthest behind; among them, those outside a collective; if all or none of them are in one, those whose main
    thread is on a different line from most.
    """
    first = min((report.step, report.beat) for report in reports)
    behind = [report for report in reports if (report.step, report.beat) == first]

    # a rank that computes while the others are in a collective is the one that they wait for
    if working := [one for one in behind if not any(part in one.innermost for part in _COLLECTIVES)]:
        behind = working

    line, count = Counter(report.innermost for report in behind).most_common(1)[0]
    apart = [report for report in behind if report.innermost != line]
    return apart if apart and count > len(behind) / 2 else behind


def _staying(odd: Sequence[RankReport], how: str, reports: Sequence[RankReport]) -> str:
    first = odd[0]
    others = Counter(
        f'"{one.phase}"' + (f" of step {one.step}" if one.step != first.step else "")
        for one in reports
        if one not in odd and one.kind != GONE
    )
    wait = f" while the others wait in {others.most_common(1)[0][0]}" if others else ""
    state = f"{how} in" if how else "in"
    return f"{_subject(odd)} has been {state} {first.where} for {first.seconds:.0f} s{wait}"


def _stacks(odd: Sequence[RankReport]) -> str:
    first = odd[0]
    if first.stacks:
        return f"its stacks are in {first.stacks}"
    return f"it wrote no stacks (process state {first.state or 'unknown'})"


def _subject(found: Sequence[RankReport]) -> str:
    others = [report.rank for report in found[1:]]
    return found[0].who + (f", like {_named(others)}," if others else "")


def _named(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 1 and 2`, `ranks 0, 1, 2 and 5 more`."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > _MOST_NAMED:
        names[_MOST_NAMED - 1 :] = [f"{len(names) - _MOST_NAMED + 1} more"]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
