"""Where the wall time of a run goes: the phases of a step, goodput, and what to improve first. No torch."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ecar_dist.runtime.watchdog.heartbeat import PHASES

PRODUCTIVE = ("forward", "backward", "optimizer")  # phases that train

# A rank is slow if its time exceeds SLOW_RATIO times the median, and exceeds the median by SLOW_SHARE of the interval,
# in SLOW_INTERVALS intervals in a row.
SLOW_RATIO = 1.2
SLOW_SHARE = 0.05
SLOW_INTERVALS = 3

# At these shares of the time or more, something other than computing is reported as the bottleneck.
DATA_SHARE, CHECKPOINT_SHARE, OTHER_SHARE = 0.10, 0.05, 0.10


class Phases:
    """The phase this rank is in, and the seconds it has spent in each so far.

    The times are those of the host. With a GPU it runs ahead of the device, and the wait for the device counts in the
    phase that first needs a number from it: `optimizer`, where the step is judged. Measuring adds no synchronisation.
    """

    def __init__(self, beat: Callable[[str, int], None], clock: Callable[[], float] = time.perf_counter) -> None:
        """`beat(phase, step)` is called on every change, and once here for the first phase."""
        self._beat = beat
        self._clock = clock
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._name = next(iter(PHASES))
        self._since = clock()
        beat(self._name, 0)

    def enter(self, name: str, step: int) -> None:
        """Count the time from now until the next call for `name`. Takes about a microsecond plus the beat."""
        now = self._clock()
        self._totals[self._name] += now - self._since
        self._totals[name] += 0.0  # a misspelt name fails here, not at the next change
        self._name = name
        self._since = now
        self._beat(name, step)

    def totals(self) -> dict[str, float]:
        """Seconds in each phase so far, the current one included: their total is the age of this object."""
        totals = dict(self._totals)
        totals[self._name] += self._clock() - self._since
        return totals


class Goodput:
    """The share of the wall time since the run's first attempt that went into steps that count.

    That is forward, backward and optimizer of the steps that moved the weights and were not lost later. After a kill or
    a roll-back, the steps since the restored checkpoint are lost, so the sum is stored in the checkpoint. Time between
    two attempts counts as lost, including time in a scheduler's queue.
    """

    def __init__(self, run_began: float | None = None) -> None:
        """`run_began`: seconds since the epoch; None on the ranks that do not report."""
        self._run_began = run_began
        self._seen = 0.0  # productive seconds of this attempt, kept or not
        self._kept = 0.0  # productive seconds of the run that count

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint stores, as JSON values."""
        return {"kept_seconds": self._kept}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint with this state: steps after it do not count."""
        self._kept = float((state or {}).get("kept_seconds", 0.0))

    def end_step(self, productive: float, applied: bool) -> None:
        """`productive`: seconds that this attempt has spent in productive phases so far."""
        if applied:
            self._kept += productive - self._seen
        self._seen = productive

    def values(self) -> dict[str, float]:
        if self._run_began is None:
            return {}
        return {"perf/goodput": min(1.0, self._kept / max(1e-9, time.time() - self._run_began))}


def run_began(attempts: Sequence[Mapping[str, Any]]) -> float:
    """When the first attempt of a run (lineage.json) began, in seconds since the epoch; now if none has the time."""
    started = next((one["started"] for one in attempts if one.get("started")), None)
    return datetime.datetime.fromisoformat(started).timestamp() if started else time.time()


@dataclass(frozen=True)
class SlowRank:
    """One rank that has been slower than the others for several intervals in a row."""

    rank: int
    ratio: float  # the time for its own work, divided by that of the median rank
    part: str  # where it loses most of that time: "forward" or "data"

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
        """The share of each phase, in [0, 1]."""
        return {name: self.share(seconds) for name, seconds in self.phases.items()}

    def bottleneck(self) -> str:
        """What to improve first. "compute-bound" is what remains: computing, and communication between ranks."""
        shares = self.shares()
        if self.slow:
            return f"rank {self.slow.rank} is {self.slow.ratio:.1f}x slower than the median rank ({self.slow.part})"
        if self.share(self.data_wait) >= DATA_SHARE:
            return f"data-bound: {self.share(self.data_wait):.0%} of the time waits for data"
        if shares.get("checkpoint", 0.0) >= CHECKPOINT_SHARE:
            return f"checkpoint-bound: {shares['checkpoint']:.0%} of the time waits for checkpoints"
        for name in ("preview", "log", "validate"):
            if shares.get(name, 0.0) >= OTHER_SHARE:
                return f"{name}-bound: {shares[name]:.0%} of the time goes into {name}"
        return "compute-bound"

    def kind(self) -> str:
        """The bottleneck without its numbers: a change of kind is worth a line."""
        return f"rank {self.slow.rank}" if self.slow else self.bottleneck().partition(":")[0]


class Stragglers:
    """Watches for one rank that is slow in every interval."""

    def __init__(self) -> None:
        self._rank = -1  # the slowest of the last interval
        self._row = 0  # intervals in a row in which it was slow

    def observe(self, own: Sequence[Mapping[str, float]], elapsed: float) -> SlowRank | None:
        """The slow rank, if there is one after this interval of `elapsed` seconds.

        `own`: for every rank the seconds of the interval that went into its own work, by part, e.g. {"forward": 1.9,
        "data": 0.1}. Time in which it waits for another rank is not included.
        """
        # Compare the slowest rank with the median: of two ranks, that is the faster one.
        totals = [sum(parts.values()) for parts in own]
        median = statistics.median_low(totals)
        worst = max(range(len(totals)), key=totals.__getitem__)
        slow = totals[worst] > SLOW_RATIO * median and totals[worst] - median > SLOW_SHARE * elapsed

        # One slow interval may be chance: only several in a row count.
        if not slow:
            self._row = 0
        elif worst == self._rank:
            self._row += 1
        else:
            self._row = 1
        self._rank = worst
        if self._row < SLOW_INTERVALS:
            return None

        # The part in which it loses most compared with the median of that part.
        usual = {part: statistics.median_low([parts[part] for parts in own]) for part in own[worst]}
        part = max(usual, key=lambda name: own[worst][name] - usual[name])
        return SlowRank(worst, totals[worst] / max(median, 1e-9), part)
