"""The sections of gpu.sh that train: speed and memory of whole runs, and where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu_run import Row, Run, attainable_flops, attempted, data_sheet_flops, release_memory
from synthetic_run import Enough, driven, run_config, write_latents

from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import device_memory
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.train.loop import Parts

TOP = 15  # kernels of the profile


def training(run: Run) -> Iterator[Row]:
    """`ecar-dist train` at several micro-batches, eager and compiled."""
    world = start_world()
    write_latents(run.work / "latents", run.size.latent_size)
    attainable = attainable_flops(run)
    for mode in run.modes:
        for micro_batch in run.size.micro_batches:

            def measure(mode: str = mode, micro_batch: int = micro_batch) -> Row:
                return _train_row(run, world, mode, micro_batch, attainable)

            yield attempted(f"{run.preset}, {mode}, micro-batch {micro_batch}", measure)
    stop_world()


def _config(run: Run, name: str, micro_batch: int, mode: str, zero_stage: int = 2) -> RunConfig:
    sections = {"deepspeed": {"zero_stage": zero_stage}, "train": {"compile": mode == "compiled"}}
    return run_config(run.work, name, run.preset, run.size.latent_size, micro_batch, **sections)


def _train_row(run: Run, world: World, mode: str, micro_batch: int, attainable: float) -> Row:
    config = _config(run, f"{mode}-{micro_batch}", micro_batch, mode)
    if run.on_gpu:
        release_memory()
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(run, run.size.warm_up, run.size.seconds)
    driven(config, world, clock)

    # Rates, without waiting for single steps.
    step = clock.seconds / clock.steps
    flops = FLOPS_PER_MAC * kind_of(config).training_macs(config) * micro_batch / step
    peak = data_sheet_flops(run)
    row: Row = {"step_seconds": step, "samples_per_second": micro_batch / step, "steps": clock.steps}
    row |= {"first_steps_seconds": clock.warm_up_seconds, "mfu_of_attainable": flops / attainable}
    shown = [f"{micro_batch / step:.4g} samples/s", f"{step * 1e3:.1f} ms a step", f"MFU {flops / attainable:.1%}"]
    shown[-1] += " of attainable"
    if peak:
        row["mfu_of_data_sheet"] = flops / peak
        shown.append(f"{flops / peak:.1%} of the data sheet")

    # Memory, next to the forecast of the plan.
    planned = device_memory(
        config, 1, zero_stage=config.deepspeed.zero_stage, compiled=mode == "compiled", recompute=False
    ).total(micro_batch)
    row["planned_gib"] = planned / 2**30
    if run.on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        shown.append(f"peak {row['peak_gib']:.1f} GiB, planned {row['planned_gib']:.1f}")
    shown.append(f"first {run.size.warm_up} steps {clock.warm_up_seconds:.1f} s")
    return {"found": ", ".join(shown), **row}


class _Clock:
    """Visits a run: times its steps together, after some untimed ones, and synchronises the device at both ends."""

    def __init__(self, run: Run, warm_up: int, seconds: float) -> None:
        self._run = run
        self._warm_up = warm_up
        self._for = seconds
        self._done = -1
        self.steps = 0
        self.seconds = 0.0
        self.warm_up_seconds = 0.0
        self._began = 0.0

    def begin(self, parts: Parts) -> None:
        """See `Visitor`."""
        self._began = time.perf_counter()

    def between(self, batches: Sequence[MicroBatch] | None) -> None:
        """See `Visitor`."""
        self._done += 1
        if self._done == self._warm_up:
            self._run.wait()
            self.warm_up_seconds = time.perf_counter() - self._began
            self._began = time.perf_counter()
        elif self._done > self._warm_up and time.perf_counter() - self._began > self._for:
            self._run.wait()
            self.seconds = time.perf_counter() - self._began
            self.steps = self._done - self._warm_up
            raise Enough


def profile(run: Run) -> Iterator[Row]:
    """The kernels of a training step that take the most device time."""
    world = start_world()
    write_latents(run.work / "latents", run.size.latent_size)
    for mode in run.modes:
        profiled = _Profile(run)
        config = _config(run, f"profile-{mode}", run.size.micro_batches[-2], mode)
        driven(config, world, profiled)
        yield from profiled.rows(f"{mode}, micro-batch {config.batch.micro_batch_size}")
    stop_world()


class _Profile:
    """Visits a run: profiles some steps after a few others."""

    STEPS = 2

    def __init__(self, run: Run) -> None:
        self._run = run
        self._done = -1
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)

    def begin(self, parts: Parts) -> None:
        """See `Visitor`."""

    def between(self, batches: Sequence[MicroBatch] | None) -> None:
        """See `Visitor`."""
        self._done += 1
        if self._done == self._run.size.warm_up:
            self._run.wait()
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._done == self._run.size.warm_up + self.STEPS:
            self._run.wait()
            self.seconds = time.perf_counter() - self._began
            self._profiler.stop()
            raise Enough

    def rows(self, what: str) -> Iterator[Row]:
        """The totals of a step, then its kernels by time."""
        events = self._profiler.key_averages()
        kernels = [event for event in events if self._is_kernel(event)]
        kernels.sort(key=self._microseconds, reverse=True)
        busy = sum(map(self._microseconds, kernels)) / 1e6 / self.STEPS
        step = self.seconds / self.STEPS
        calls = {event.key: event.count / self.STEPS for event in events if event.key.startswith("cuda")}
        launches = sum(event.count for event in kernels) / self.STEPS
        waits = sum(count for name, count in calls.items() if name.endswith("Synchronize"))
        text = f"{launches:.0f} kernels busy {busy * 1e3:.1f} of {step * 1e3:.1f} ms; the host waits {waits:g} times"
        yield {
            "what": f"{what}, a step",
            "found": text,
            "cuda_calls": calls,
            "kernels": launches,
            "busy_seconds": busy,
            "step_seconds": step,
        }
        for number, event in enumerate(kernels[:TOP], 1):
            seconds = self._microseconds(event) / 1e6 / self.STEPS
            text = f"{seconds * 1e3:8.3f} ms {seconds / busy:6.1%} {event.count / self.STEPS:7.0f} x {event.key[:90]}"
            yield {"what": f"{what}, kernel {number}", "found": text, "name": event.key, "seconds": seconds}

    def _is_kernel(self, event: Any) -> bool:
        if not self._run.on_gpu:
            return event.self_cpu_time_total > 0
        return event.device_type == torch.autograd.DeviceType.CUDA

    def _microseconds(self, event: Any) -> float:
        return event.self_device_time_total if self._run.on_gpu else event.self_cpu_time_total
