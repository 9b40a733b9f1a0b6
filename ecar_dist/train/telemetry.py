"""What is measured around a step, and how it is reported. docs/telemetry.md lists the tags."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch

from ecar_dist.command_line import duration
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.devices import peak_bf16_flops
from ecar_dist.runtime.world import World
from ecar_dist.train.time_budget import PRODUCTIVE, Goodput, Phases, SlowRank, Stragglers, TimeBudget


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    stage_losses: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    applied: bool = True  # whether weights moved
    replaced_samples: int = 0  # damaged samples of the global batch (data.on_bad=substitute)


@dataclass(frozen=True)
class Counters:
    """What other parts have counted since this attempt began."""

    data_wait_seconds: float = 0.0  # of this rank
    stall_seconds: float = 0.0  # for which checkpoints blocked this rank
    checkpoint_failures: int = 0
    skipped_steps: int = 0  # since the run began
    downloads: Mapping[str, float] = field(default_factory=dict)  # of this rank, by tag


@dataclass(frozen=True)
class Report:
    """What there is to log after a step."""

    values: dict[str, float]  # by TensorBoard tag
    news: str | None  # the bottleneck, if it has changed


@dataclass(frozen=True)
class _Mark:
    """The totals at one moment of this attempt."""

    phases: Mapping[str, float]  # seconds
    data_wait: float = 0.0  # seconds: the sum over intervals of the longest wait of any rank
    steps: int = 0
    samples: int = 0


class LossByTime:
    """The loss by stage and flow time, to show where on its path a sample is hard. `add` never synchronises."""

    def __init__(self, num_stages: int, bins: int, device: torch.device) -> None:
        self._bins = bins
        self._first_bin = torch.arange(num_stages, device=device) * bins  # of each stage
        self._table = torch.zeros(2, num_stages * bins, dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, times: torch.Tensor) -> None:
        """Both [B, K], times in [0, 1]. A loss that is not finite, or has no single time (NaN), is left out."""
        finite = losses.isfinite() & times.isfinite()
        index = (times.nan_to_num() * self._bins).long().clamp_(0, self._bins - 1) + self._first_bin  # [B, K]
        values = torch.stack([losses.where(finite, 0.0), finite]).to(self._table.dtype)  # [2, B, K]
        self._table.index_add_(1, index.flatten(), values.flatten(1))

    def take(self) -> torch.Tensor:
        """What was added since the last call, flat: all sums, then all counts. To be summed over ranks."""
        table = self._table
        self._table = torch.zeros_like(table)
        return table.flatten()

    def means(self, table: Sequence[float]) -> dict[str, float]:
        """The means by tag, from the result of `take`; a bin without samples has no value."""
        cells = len(table) // 2
        return {
            f"train/loss_stage{cell // self._bins}_t{cell % self._bins}": table[cell] / table[cells + cell]
            for cell in range(cells)
            if table[cells + cell]
        }


class ForwardClock:
    """Seconds between entering and leaving `with`: on the device if it is a GPU, else on the host.

    On a GPU two events are recorded in the stream and read by `take`; the host does not wait for the device before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            self._events.append((_recorded(), None))
        else:
            self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._events[-1] = (self._events[-1][0], _recorded())
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds measured since the last call. Waits for the device to finish the measured work."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._seconds = 0.0
        self._events = []
        return seconds


def _recorded() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Telemetry:
    """Rates, time budget and bottleneck since the last report, and goodput since the run began."""

    def __init__(
        self, config: RunConfig, world: World, phases: Phases, goodput: Goodput, training_flops_per_sample: float
    ) -> None:
        self._config = config
        self._world = world
        self.phases = phases
        self.goodput = goodput
        self.forward_clock = ForwardClock(world.device)
        self.losses = LossByTime(config.flow.num_stages, config.log.time_bins, world.device)

        # For the MFU, if the device's peak is known.
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        peak = peak_bf16_flops(name)
        self._peak = peak and peak * world.size
        self._flops_per_sample = training_flops_per_sample

        # Totals of this attempt.
        self._steps = 0
        self._samples = 0
        self._own_wait = 0.0  # seconds that this rank has waited for data
        self._data_wait = 0.0  # as `_Mark.data_wait`

        # Where the first and the last interval began. The time before the first report is the start-up.
        self._first: _Mark | None = None
        self._last = _Mark(dict.fromkeys(phases.totals(), 0.0))

        # What was found and reported last.
        self._stragglers = Stragglers()
        self._slow: SlowRank | None = None
        self._kind = ""  # of the bottleneck
        self._reported_kind = ""

    def end_step(self, samples: int, applied: bool) -> None:
        """Count a computed step; `applied`: whether weights moved. Not called for a step that was passed over."""
        totals = self.phases.totals()
        self.goodput.end_step(sum(totals[name] for name in PRODUCTIVE), applied)
        self._steps += 1
        self._samples += samples

    def report(self, result: StepResult, samples_seen: int, counters: Counters) -> Report:
        """The values of this step and of the interval since the last report. Collective: one small all-reduce."""
        # What each rank has measured since the last report, and the losses by time over all ranks.
        own_wait = counters.data_wait_seconds - self._own_wait
        self._own_wait = counters.data_wait_seconds
        losses, ranks = self._over_ranks([self.forward_clock.take(), own_wait, *_peak_memory(self._world.device)])
        forward, data, peak, reserved = zip(*ranks, strict=True)
        self._data_wait += max(data)

        # Where the time of the interval went.
        mark = self._mark()
        budget = _budget(self._last, mark)
        own = [{"forward": a, "data": b} for a, b in zip(forward, data, strict=True)]
        self._slow = self._stragglers.observe(own, budget.elapsed)
        budget = replace(budget, slow=self._slow)

        # All tags; rates, and what limits them, only once the start-up is over.
        values = {
            **self._step_values(result, samples_seen),
            **losses,
            **{f"time/{name}": share for name, share in budget.shares().items()},
            "perf/data_wait_fraction": budget.share(budget.data_wait),
            "mem/peak_gib": max(peak),
            **({"mem/peak_reserved_gib": max(reserved)} if max(reserved) else {}),
            **self.goodput.values(),
            **_counter_values(counters, mark),
            **(self._slow.values() if self._slow else {}),
        }
        news = None
        if self._first:
            values |= self._rates(self._last, mark)
            news = self._news(budget)
        self._first = self._first or mark
        self._last = mark
        return Report(values, news)

    def closing_line(self) -> str | None:
        """One line about the attempt from its first report on; None if no step followed that report."""
        now = self._mark()
        if self._first is None or now.steps == self._first.steps:
            return None
        budget = _budget(self._first, now, self._slow)
        rates = self._rates(self._first, now)
        parts = [f"{rates['perf/samples_per_second']:,.0f} samples/s"]
        if "perf/mfu" in rates:
            parts.append(f"MFU {rates['perf/mfu']:.1%} of the data sheet's peak")
        parts.append(f"data wait {budget.share(budget.data_wait):.1%}")
        parts.append(f"checkpoint stall {budget.shares()['checkpoint']:.1%}")
        parts += [f"goodput {share:.1%}" for share in self.goodput.values().values()]
        return f"overall: {', '.join(parts)}; {budget.bottleneck()}"

    def _mark(self) -> _Mark:
        return _Mark(self.phases.totals(), self._data_wait, self._steps, self._samples)

    def _over_ranks(self, own: Sequence[float]) -> tuple[dict[str, float], list[list[float]]]:
        """The loss by time over all ranks, and each rank's own numbers in rank order. Takes one sum over ranks."""
        # Each rank fills its own row, so that the sum of the rows gathers them.
        table = self.losses.take()
        size = self._world.size
        rows = torch.zeros(size, len(own), dtype=table.dtype, device=table.device)
        rows[self._world.rank] = torch.tensor(own, dtype=table.dtype)
        total = self._world.sum(torch.cat([table, rows.flatten()])).cpu()
        means = self.losses.means(total[: len(table)].tolist())
        return means, total[len(table) :].view(size, -1).tolist()

    def _step_values(self, result: StepResult, samples_seen: int) -> dict[str, float]:
        return {
            "train/loss": result.loss,
            **{f"train/loss_stage{k}": loss for k, loss in enumerate(result.stage_losses)},
            "train/grad_norm": result.grad_norm,
            "train/lr": result.learning_rate,
            "train/tokens": float(samples_seen * sum(self._config.stage_tokens)),
        }

    def _rates(self, begin: _Mark, end: _Mark) -> dict[str, float]:
        elapsed = _budget(begin, end).elapsed
        steps = end.steps - begin.steps
        rate = (end.samples - begin.samples) / elapsed
        values = {
            "perf/samples_per_second": rate,
            "perf/tokens_per_second": rate * sum(self._config.stage_tokens),
            **({"perf/step_seconds": elapsed / steps} if steps else {}),
        }
        if self._peak:
            values["perf/mfu"] = rate * self._flops_per_sample / self._peak
        return values

    def _news(self, budget: TimeBudget) -> str | None:
        """The bottleneck, if its kind is new and has lasted for two intervals: one slow shard is not news."""
        kind = budget.kind()
        before = self._kind
        self._kind = kind
        if kind != before or kind == self._reported_kind:
            return None
        self._reported_kind = kind
        return budget.bottleneck()


def _budget(begin: _Mark, end: _Mark, slow: SlowRank | None = None) -> TimeBudget:
    phases = {name: seconds - begin.phases[name] for name, seconds in end.phases.items()}
    return TimeBudget(max(1e-9, sum(phases.values())), phases, end.data_wait - begin.data_wait, slow)


def _counter_values(counters: Counters, mark: _Mark) -> dict[str, float]:
    return {
        "checkpoint/stall_seconds": counters.stall_seconds,
        "checkpoint/stall_fraction": counters.stall_seconds / max(1e-9, sum(mark.phases.values())),
        "checkpoint/failures": float(counters.checkpoint_failures),
        "train/skipped_steps": float(counters.skipped_steps),
    }


def _peak_memory(device: torch.device) -> tuple[float, float]:
    """The peak memory of this process and, on a GPU, the peak that its allocator reserved, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 0.0


def progress_line(
    step: int, total_steps: int, samples_seen: int, total: int, result: StepResult, report: Report
) -> str:
    """One line of the log: position, losses, rate, time left, and the bottleneck if it has changed."""
    values = report.values
    stages = " ".join(_short(loss, 4) for loss in result.stage_losses)
    line = (
        f"step {step}/{total_steps}  loss {_short(result.loss, 4)} ({stages})  grad {_short(result.grad_norm, 3)}  "
        f"lr {result.learning_rate:.2e}"
    )
    if rate := values.get("perf/samples_per_second"):
        line += f"  {rate:,.0f} samples/s  data wait {values['perf/data_wait_fraction']:.0%}"
        line += f"  left {duration((total - samples_seen) / rate)}"
    return f"{line}  {report.news}" if report.news else line


def _short(number: float, digits: int) -> str:
    """`digits` decimal places, or three significant digits for a number so large that it would fill the line."""
    return f"{number:.{digits}f}" if abs(number) < 1e5 else f"{number:.3g}"
