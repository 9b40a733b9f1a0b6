"""The framework tax: a step of `ecar-dist train` over a bare PyTorch step of the same model on the same batch.

Both take turns in one process. `python benchmarks/step.py` measures preset S at ZeRO 0 and 2, in about five minutes on
two cores. The last line is JSON. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds
from operators import OperatorCount
from synthetic_run import Enough, driven, run_config, write_latents

from ecar_dist.config.knobs_training import LogSection
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.kinds.table import kind_of
from ecar_dist.learning_rate import learning_rate
from ecar_dist.models.layers import weight_decay_groups
from ecar_dist.runtime.compiler import compile_blocks
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.train.loop import Parts
from ecar_dist.train.sources import check_data, normaliser
from ecar_dist.train.time_budget import Phases

TARGET = 1.05
WARM_UP = 3
IN_BOTH = "copy of the batch to the device, forward, backward, gradient clipping, AdamW"
ONLY_OURS = (
    "DeepSpeed, shards read by the loader, check of loss and norm before weights move, EMA, loss by stage and time, "
    "phases and watchdog"
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    world = start_world()
    if options.device and options.device != world.device.type:
        sys.exit(f"--device {options.device}: torch uses {world.device.type} here; leave --device out")
    result: dict[str, Any] = {**_about(options, world), "cases": []}
    with tempfile.TemporaryDirectory(prefix="ecar-benchmark-", dir=options.work) as folder:
        write_latents(Path(folder) / "latents", options.latent_size)
        for zero_stage in options.zero_stage:
            result["cases"].append(measure(Path(folder), world, options, zero_stage))
            report(result["cases"][-1])
    stop_world()
    rounds.publish(result, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S", help="row of kinds/presets.py (default: S)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="end with an error on any other device")
    parser.add_argument("--zero-stage", nargs="+", type=int, default=[0, 2], help="(default: 0 2)")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument(
        "--latent-size", type=int, default=16, help="side of the latents, in patches of 2 (default: 16)"
    )
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each contender (default: 12)")
    parser.add_argument("--compile", action="store_true", help="compile both; also compare eager with compiled")
    parser.add_argument("--work", help="folder for latents and run directories (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    return parser.parse_args(arguments)


def _about(options: argparse.Namespace, world: World) -> dict[str, Any]:
    on_gpu = world.device.type == "cuda"
    return {
        "hardware": options.hardware or (f"{torch.cuda.get_device_name()}, " if on_gpu else "") + rounds.hardware(),
        "device": world.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "in_both": IN_BOTH,
        "only_ours": ONLY_OURS,
        "target": TARGET,
    }


def measure(folder: Path, world: World, options: argparse.Namespace, zero_stage: int) -> dict[str, Any]:
    """Build the run and the bare model, let them take turns, and summarise."""
    sections = {
        "deepspeed": {"zero_stage": zero_stage},
        "log": {"every_steps": 5},
        "train": {"compile": options.compile},
    }
    name = f"zero-{zero_stage}"
    config = run_config(folder, name, options.preset, options.latent_size, options.micro_batch, **sections)
    turns = Turns(config, world, options.steps, both_modes=options.compile)
    driven(config, world, turns)
    return {
        "preset": options.preset,
        "zero_stage": zero_stage,
        "micro_batch": options.micro_batch,
        "tokens": "/".join(map(str, config.stage_tokens)),
        "parameters": sum(parameter.numel() for parameter in turns.bare.parameters),
        "device": world.device.type,
        "precision": config.precision_on(world.device.type),
        **turns.summary(),
    }


class Bare:
    """The same objective, with the same initial weights, trained by PyTorch alone.

    Weights are fp32; with bf16, autocast rounds them. AdamW is fused, and blocks are compiled, as in the run.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        kind = kind_of(config)
        torch.manual_seed(config.run.seed)
        model = kind.build_model(config)
        normalise = normaliser(check_data(config), None)
        self._objective: nn.Module = kind.objective(model, normalise, config, config.precision_on(device.type))
        self._objective.to(device).train()
        if config.compiles_on(device.type):
            compile_blocks(model)
        self._config = config
        self._device = device
        self.parameters = list(model.parameters())
        self.phases = Phases(lambda name, step: None)

        # The optimizer of runtime/engine.py.
        optim = config.optim
        decay, no_decay = weight_decay_groups(model)
        groups = [
            {"params": decay, "weight_decay": optim.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True)

    def step(self, batches: Sequence[MicroBatch], step: int) -> torch.Tensor:
        """Optimizer step number `step`; returns the loss, on the device."""
        # Forward.
        self.phases.enter("forward", step)
        (micro,) = batches
        parts = (micro.values, micro.labels, micro.positions)
        loss = self._objective(*(part.to(self._device, non_blocking=True) for part in parts))[0]

        # Backward.
        self.phases.enter("backward", step)
        loss.backward()

        # Optimizer.
        self.phases.enter("optimizer", step)
        nn.utils.clip_grad_norm_(self.parameters, self._config.optim.clip_grad_norm)
        seen = step * self._config.batch.global_batch_size
        rate = learning_rate(self._config.optim, seen, self._config.train.total_samples)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        self.phases.enter("start", step)
        return loss.detach()


class Span(NamedTuple):
    """Seconds, by the clock and of all threads of this process."""

    clock: float
    cpu: float

    def __sub__(self, earlier: Span) -> Span:
        return Span(self.clock - earlier.clock, self.cpu - earlier.cpu)


@dataclass(frozen=True)
class Turn:
    """One step of the run and then one of the bare model, in seconds; phases are host time, without waiting."""

    mode: str  # of the run's step
    ours: Span
    bare: Span
    our_phases: dict[str, float]
    bare_phases: dict[str, float]


class Turns:
    """Visits a run: after each of its steps the bare model takes one on the same batch. The first steps are not timed.

    The last step of each runs under the operator counter and is not timed either. With `both_modes` both are compiled,
    and every second turn runs eagerly.
    """

    def __init__(self, config: RunConfig, world: World, steps: int, *, both_modes: bool) -> None:
        self._config = config
        self._device = world.device
        self._modes = ("compiled", "eager") if both_modes else ("eager",)
        self._timed_from = WARM_UP * len(self._modes)
        self._timed_to = self._timed_from + steps * len(self._modes)
        self._counted_at = self._timed_to + self._logs(self._timed_to)  # not a step that writes to the log
        self.bare = Bare(config, world.device)

        # What is measured: turn 0 is the first step.
        self._number = -1
        self._turns: list[Turn] = []
        self._losses: list[torch.Tensor] = []  # of the bare model, by step
        self._counts: dict[str, OperatorCount] = {}

    def begin(self, parts: Parts) -> None:
        """See `Visitor`."""
        self._phases = parts.telemetry.phases
        self._began = self._now()
        self._phases_began = self._phases.totals()

    def between(self, batches: Sequence[MicroBatch] | None) -> None:
        """See `Visitor`."""
        # A step of the run has ended: the bare model's turn.
        ours = self._now() - self._began
        phases = _difference(self._phases.totals(), self._phases_began)
        if self._number == self._counted_at:
            self._counts["ours"].__exit__(None, None, None)
        if batches is not None:
            self._take_bare_turn(batches, ours, phases)

        # The next step of the run.
        self._number += 1
        if self._number > self._counted_at:
            torch.compiler.set_stance("default")
            raise Enough
        torch.compiler.set_stance("default" if self._mode == "compiled" else "force_eager")
        if self._number == self._counted_at:
            self._counts["ours"] = OperatorCount().__enter__()
        self._phases_began = self._phases.totals()
        self._began = self._now()

    def _take_bare_turn(self, batches: Sequence[MicroBatch], ours: Span, our_phases: dict[str, float]) -> None:
        # Under the counter.
        if self._number == self._counted_at:
            with OperatorCount() as self._counts["bare"]:
                self.bare.step(batches, self._number + 1)
            return

        # By the clock.
        phases_began = self.bare.phases.totals()
        began = self._now()
        self._losses.append(self.bare.step(batches, self._number + 1))
        bare = self._now() - began
        phases = _difference(self.bare.phases.totals(), phases_began)
        self._turns.append(Turn(self._mode, ours, bare, our_phases, phases))

    @property
    def _mode(self) -> str:
        """The mode of the run's current step; the counted one is eager."""
        return "eager" if self._number == self._counted_at else self._modes[self._number % len(self._modes)]

    def _now(self) -> Span:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return Span(time.perf_counter(), time.process_time())

    def summary(self) -> dict[str, Any]:
        """Ratios within a turn, over the mean of the bare steps before and after; their median and quartiles."""
        timed = range(self._timed_from, self._timed_to)
        found: dict[str, Any] = {}
        for mode in self._modes:
            numbers = [number for number in timed if self._turns[number].mode == mode]
            # A step that writes to the log is compared by itself.
            quiet = [number for number in numbers if not self._logs(number)]
            found[mode] = {"steps": len(quiet), **self._taxes(quiet), **self._seconds(quiet)}
            if logged := [self._turns[number].ours.clock for number in numbers if self._logs(number)]:
                found[mode]["log_seconds"] = statistics.median(logged) - found[mode]["seconds"]
        if len(self._modes) > 1:
            pairs = [(self._turns[n].ours.clock, self._turns[n + 1].ours.clock) for n in timed[::2]]
            found["eager_over_compiled"] = _spread([eager / compiled for compiled, eager in pairs])
        counts = {name: count.summary() for name, count in self._counts.items()}
        return {**found, "counts": counts, "largest_relative_difference_of_losses": self._largest_difference()}

    def _taxes(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The tax of these turns, by the clock and in CPU time."""
        found = {}
        for name, pick in (("tax", "clock"), ("tax_in_cpu_time", "cpu")):
            ours = [getattr(self._turns[number].ours, pick) for number in numbers]
            before = [getattr(self._turns[number - len(self._modes)].bare, pick) for number in numbers]
            after = [getattr(self._turns[number].bare, pick) for number in numbers]
            found[name] = _spread([2 * a / (b + c) for a, b, c in zip(ours, before, after, strict=True)])
        return found

    def _seconds(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Medians of these turns: of the whole step, and of its phases."""
        turns = [self._turns[number] for number in numbers]
        return {
            "seconds": statistics.median(turn.ours.clock for turn in turns),
            "bare_seconds": statistics.median(turn.bare.clock for turn in turns),
            "phases": _medians([turn.our_phases for turn in turns]),
            "bare_phases": _medians([turn.bare_phases for turn in turns]),
        }

    def _logs(self, number: int) -> bool:
        return (number + 1) % self._config.log.every_steps == 0

    def _largest_difference(self) -> float:
        """The largest relative difference between the logged losses and the bare model's: both learn the same."""
        path = self._config.run_directory / "metrics.jsonl"
        logged = [json.loads(line) for line in path.read_text().splitlines()]
        bare = [float(loss) for loss in self._losses]
        pairs = [(line["train/loss"], bare[line["step"] - 1]) for line in logged if line["step"] <= len(bare)]
        return max(abs(ours - theirs) / theirs for ours, theirs in pairs)


def _difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: seconds - before[name] for name, seconds in after.items()}


def _medians(phases: Sequence[dict[str, float]]) -> dict[str, float]:
    medians = {name: statistics.median(one[name] for one in phases) for name in phases[0]}
    return {name: medians[name] for name in ("data", "forward", "backward", "optimizer")}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "quartiles": np.quantile(values, (0.25, 0.75)).tolist()}


def _shown(spread: dict[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{spread['median']:.3f} ({low:.3f} to {high:.3f})"


def report(found: dict[str, Any]) -> None:
    """Print the case in readable form."""
    print(
        f"\npreset {found['preset']}, ZeRO {found['zero_stage']}, {found['precision']}, "
        f"{found['parameters'] / 1e6:.1f} M parameters, micro-batch {found['micro_batch']}, {found['tokens']} tokens"
    )
    for mode in (mode for mode in ("eager", "compiled") if mode in found):
        _report_mode(mode, found[mode], found["device"])
    if "eager_over_compiled" in found:
        print(f"time of an eager step over a compiled one: {_shown(found['eager_over_compiled'])}")
    difference = found["largest_relative_difference_of_losses"]
    print(f"largest relative difference of the two losses: {difference:.2g}")
    _report_counts(found["counts"])


def _report_mode(mode: str, found: dict[str, Any], device: str) -> None:
    # Other processes affect the clock more than the CPU time; on a GPU the latter only covers the launches.
    judged = ("tax", "tax_in_cpu_time") if device == "cpu" else ("tax",)
    verdict = "met   " if all(found[name]["median"] <= TARGET for name in judged) else "MISSED"
    print(
        f"{verdict}  time of a step, {mode}, over a bare one: {_shown(found['tax'])}, in CPU time "
        f"{_shown(found['tax_in_cpu_time'])}; target <= {TARGET}"
    )
    seconds, bare_seconds = found["seconds"], found["bare_seconds"]
    print(f"        {found['steps']} steps; ours {seconds * 1e3:.2f} ms, bare {bare_seconds * 1e3:.2f} ms")
    for name in dict.fromkeys((*found["bare_phases"], *found["phases"])):
        ours, bare = found["phases"].get(name, 0.0), found["bare_phases"].get(name, 0.0)
        extra = (ours - bare) / bare_seconds
        print(f"        {name:10} {ours * 1e3:9.2f} ms, bare {bare * 1e3:9.2f} ms: {extra:+.1%} of a bare step")
    if "log_seconds" in found:
        share = found["log_seconds"] / LogSection().every_steps / found["bare_seconds"]
        print(
            f"        a line of the log takes {found['log_seconds'] * 1e3:.1f} ms: {share:+.2%} at the default interval"
        )


def _report_counts(counts: dict[str, dict[str, Any]]) -> None:
    for name, count in counts.items():
        print(
            f"{name:5} eager: {count['kernels']:6d} kernels, {count['gigabytes']:8.3f} GB read and written, "
            f"{count['host_reads']:3d} host reads, {count['synchronisations']:3d} synchronisations a step"
        )
    for place, times in counts["ours"]["host_reads_by_place"].items():
        print(f"      {times:3d} x read at {place}")


if __name__ == "__main__":
    main()
