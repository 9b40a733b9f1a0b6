"""What a run's time went into, and what to say about it. Pure: numbers in, a sentence out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SLOW_RATIO = 1.2  # a rank that needs more than this multiple of the median is slow,
SLOW_INTERVALS = 3  # where it does so in so many intervals in a row
SLOW_SHARE = 0.05  # and where what it needs longer is more than this share of the interval
# From these shares on something besides computing is worth a word; the first that holds is said.
DATA_SHARE, CHECKPOINT_SHARE, OTHER_SHARE = 0.10, 0.05, 0.10


@dataclass(frozen=True)
class SlowRank:
    """One rank that is slower than the others, again and again."""

    rank: int
    ratio: float  # its time for its own work, over that of the median rank
    part: str  # of its work, the one that costs it most of the difference: "forward" or "data"

    def values(self) -> dict[str, float]:
        return {"perf/slowest_rank": float(self.rank), "perf/slowest_ratio": self.ratio}


@dataclass(frozen=True)
class TimeBudget:
    """An interval of a run, in seconds."""

    elapsed: float
    phases: Mapping[str, float] = field(default_factory=dict)  # of rank 0
    data_wait: float = 0.0  # of the rank that waited longest for its data
    slow: SlowRank | None = None

    def share(self, seconds: float) -> float:
        return min(1.0, seconds / self.elapsed) if self.elapsed > 0 else 0.0

    def shares(self) -> dict[str, float]:
        """Of each phase, in [0, 1]."""
        return {name: self.share(seconds) for name, seconds in self.phases.items()}

    def verdict(self) -> str:
        """What to fix first. "compute-bound" is what remains: computing, and talking between ranks."""
        shares = self.shares()
        if self.slow:
            return f"rank {self.slow.rank} is {self.slow.ratio:.1f}x slower than the median rank ({self.slow.part})"
        if self.share(self.data_wait) >= DATA_SHARE:
            return f"data-bound: {self.share(self.data_wait):.0%} of the time waits for data"
        if shares.get("checkpoint", 0.0) >= CHECKPOINT_SHARE:
            return f"checkpoint-bound: {shares['checkpoint']:.0%} of the time waits for checkpoints"
        for name in ("preview", "log"):
            if shares.get(name, 0.0) >= OTHER_SHARE:
                return f"{name}-bound: {shares[name]:.0%} of the time goes into {name}"
        return "compute-bound"

    def kind(self) -> str:
        """The verdict without its numbers: what must change for the verdict to be news."""
        return f"rank {self.slow.rank}" if self.slow else self.verdict().partition(":")[0]


class Stragglers:
    """Watches for one rank that is slow in every interval."""

    def __init__(self) -> None:
        self._rank, self._row = -1, 0

    def observe(self, own: Sequence[Mapping[str, float]], elapsed: float) -> SlowRank | None:
        """`own`: for every rank the seconds of the interval that went into its own work, by part, e.g. {"forward": 1.9,
        "data": 0.1}: nothing in which it waits for another rank. `elapsed`: the interval."""
        totals = [sum(parts.values()) for parts in own]
        median = statistics.median_low(totals)  # of two ranks, the faster one
        worst = max(range(len(totals)), key=totals.__getitem__)
        slow = totals[worst] > SLOW_RATIO * median and totals[worst] - median > SLOW_SHARE * elapsed
        self._row = (self._row + 1 if worst == self._rank else 1) if slow else 0
        self._rank = worst
        if self._row < SLOW_INTERVALS:
            return None
        usual = {part: statistics.median_low([parts[part] for parts in own]) for part in own[worst]}
        part = max(usual, key=lambda name: own[worst][name] - usual[name])
        return SlowRank(worst, totals[worst] / max(median, 1e-9), part)
