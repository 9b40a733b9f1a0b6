"""What is measured around a step, and how it is said on one line. docs/telemetry.md lists the tags."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ecar_dist.command_line import duration
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.devices import peak_bf16_flops
from ecar_dist.runtime.world import World
from ecar_dist.train.goodput import Goodput
from ecar_dist.train.loss_by_time import LossByTime
from ecar_dist.train.phases import ForwardClock, Phases
from ecar_dist.train.time_budget import SlowRank, Stragglers, TimeBudget

PRODUCTIVE = ("forward", "backward", "optimizer")  # phases in which a step gets on


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    stage_losses: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    applied: bool = True  # whether weights moved


@dataclass(frozen=True)
class Counters:
    """What other parts have counted since this attempt began; the skipped steps are those of the whole run."""

    data_wait_seconds: float = 0.0  # of this rank
    stall_seconds: float = 0.0  # in which a checkpoint held this rank up
    checkpoint_failures: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Report:
    """Values by TensorBoard tag; and the verdict on the time budget, where it is not the one last said."""

    values: dict[str, float]
    news: str | None


@dataclass(frozen=True)
class _Mark:
    """What had come together at one moment of this attempt."""

    phases: Mapping[str, float]  # seconds
    data_wait: float = 0.0  # seconds, in each interval of the rank that waited longest
    steps: int = 0
    samples: int = 0


class Telemetry:
    """Rates, time budget and verdict since the last report, and goodput since the run began."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        phases: Phases,
        training_flops_per_sample: float,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """`notes`: as `Goodput.notes` gave them to the restored checkpoint."""
        self._config, self._world, self._phases = config, world, phases
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        peak = peak_bf16_flops(name)
        self._peak = peak and peak * world.size
        self._flops_per_sample = training_flops_per_sample
        self.forward_clock = ForwardClock(world.device)
        self.losses = LossByTime(config.flow.num_stages, config.log.time_bins, world.device)
        self.goodput = Goodput(notes)
        self._stragglers = Stragglers()
        self._slow: SlowRank | None = None
        self._kind, self._said = "", ""  # of the last verdict, and of the last one that was said
        self._steps, self._samples, self._own_wait, self._data_wait = 0, 0, 0.0, 0.0
        self._first: _Mark | None = None  # the first report: what came before is the start-up
        self._last = _Mark(dict.fromkeys(phases.totals(), 0.0))

    def end_step(self, samples: int, applied: bool) -> None:
        """A step was computed; `applied`: whether weights moved. Not called for a step that was passed over."""
        totals = self._phases.totals()
        self.goodput.end_step(sum(totals[name] for name in PRODUCTIVE), applied)
        self._steps, self._samples = self._steps + 1, self._samples + samples

    def report(self, result: StepResult, samples_seen: int, counters: Counters) -> Report:
        """The values of this step and of the interval since the last report. Collective: one small all-reduce."""
        own_wait = counters.data_wait_seconds - self._own_wait
        losses, ranks = self._over_ranks([self.forward_clock.take(), own_wait, *_peak_memory(self._world.device)])
        forward, data, peak, reserved = zip(*ranks, strict=True)
        self._own_wait, self._data_wait = counters.data_wait_seconds, self._data_wait + max(data)
        mark = _Mark(self._phases.totals(), self._data_wait, self._steps, self._samples)
        budget = _budget(self._last, mark)
        own = [{"forward": a, "data": b} for a, b in zip(forward, data, strict=True)]
        self._slow = self._stragglers.observe(own, budget.elapsed)
        budget = replace(budget, slow=self._slow)
        values = {
            **self._step_values(result, samples_seen),
            **losses,
            **{f"time/{name}": share for name, share in budget.shares().items()},
            "perf/data_wait_fraction": budget.share(budget.data_wait),
            "mem/peak_gib": max(peak),
            **({"mem/peak_reserved_gib": max(reserved)} if max(reserved) else {}),
            **self.goodput.values(),
            **self._counted(counters, mark),
            **(self._slow.values() if self._slow else {}),
        }
        news = None
        if self._first:
            values |= self._rates(self._last, mark)
            news = self._news(budget)
        self._first, self._last = self._first or mark, mark
        return Report(values, news)

    def closing_line(self) -> str | None:
        """The attempt from its first report on, in one line; None where there is too little to say."""
        now = _Mark(self._phases.totals(), self._data_wait, self._steps, self._samples)
        if self._first is None or now.steps == self._first.steps:
            return None
        budget, rates = _budget(self._first, now, self._slow), self._rates(self._first, now)
        said = [f"{rates['perf/samples_per_second']:,.0f} samples/s"]
        if "perf/mfu" in rates:
            said.append(f"MFU {rates['perf/mfu']:.1%}")
        said.append(f"data wait {budget.share(budget.data_wait):.1%}")
        said.append(f"checkpoint stall {budget.shares()['checkpoint']:.1%}")
        said += [f"goodput {share:.1%}" for share in self.goodput.values().values()]
        return f"overall: {', '.join(said)}; {budget.verdict()}"

    def _over_ranks(self, own: Sequence[float]) -> tuple[dict[str, float], list[list[float]]]:
        """The loss by time, over all ranks; and the numbers that each rank has of its own, in rank order."""
        table, size = self.losses.take(), self._world.size
        rows = torch.zeros(size, len(own), dtype=table.dtype, device=table.device)
        rows[self._world.rank] = torch.tensor(own, dtype=table.dtype)
        total = self._world.sum(torch.cat([table, rows.flatten()])).cpu()  # a sum of rows that are 0 but for one
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

    def _counted(self, counters: Counters, mark: _Mark) -> dict[str, float]:
        return {
            "checkpoint/stall_seconds": counters.stall_seconds,
            "checkpoint/stall_fraction": counters.stall_seconds / max(1e-9, sum(mark.phases.values())),
            "checkpoint/failures": float(counters.checkpoint_failures),
            "train/skipped_steps": float(counters.skipped_steps),
        }

    def _rates(self, begin: _Mark, end: _Mark) -> dict[str, float]:
        elapsed, steps = _budget(begin, end).elapsed, end.steps - begin.steps
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
        """The verdict, where its kind is new and has held for two intervals: one slow shard is no news."""
        kind, before = budget.kind(), self._kind
        self._kind = kind
        if kind != before or kind == self._said:
            return None
        self._said = kind
        return budget.verdict()


def _budget(begin: _Mark, end: _Mark, slow: SlowRank | None = None) -> TimeBudget:
    phases = {name: seconds - begin.phases[name] for name, seconds in end.phases.items()}
    return TimeBudget(max(1e-9, sum(phases.values())), phases, end.data_wait - begin.data_wait, slow)


def _peak_memory(device: torch.device) -> tuple[float, float]:
    """GiB that this process has used at most, and those that its allocator holds on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 0.0


def progress_line(
    step: int, total_steps: int, samples_seen: int, total: int, result: StepResult, report: Report
) -> str:
    """One line of the log: where the run is, how it goes, how long it will take, and what changed in the verdict."""
    stages, values = " ".join(_short(loss, 4) for loss in result.stage_losses), report.values
    line = (
        f"step {step}/{total_steps}  loss {_short(result.loss, 4)} ({stages})  grad {_short(result.grad_norm, 3)}  "
        f"lr {result.learning_rate:.2e}"
    )
    if rate := values.get("perf/samples_per_second"):
        line += f"  {rate:,.0f} samples/s  data wait {values['perf/data_wait_fraction']:.0%}"
        line += f"  left {duration((total - samples_seen) / rate)}"
    return f"{line}  {report.news}" if report.news else line


def _short(number: float, digits: int) -> str:
    """So many digits after the point, or three in all where the number is so large that it would fill the line."""
    return f"{number:.{digits}f}" if abs(number) < 1e5 else f"{number:.3g}"
