"""What is measured around a step, and how it is said on one line."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from ecar_dist.runtime.devices import peak_bf16_flops


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    stage_losses: tuple[float, ...]
    grad_norm: float
    learning_rate: float


class Telemetry:
    """Rates since the last report."""

    def __init__(self, device: torch.device, world_size: int, training_flops_per_sample: float) -> None:
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_bf16_flops(name)
        self._peak = peak and peak * world_size
        self._flops_per_sample = training_flops_per_sample
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0

    def report(self, result: StepResult, samples_seen: int, waited: float) -> dict[str, float]:
        """The values of this step by TensorBoard tag. `waited`: seconds waited for data since the start of the run."""
        now = time.monotonic()
        elapsed = max(1e-9, now - self._since)
        # The first interval holds the start-up: its rate says nothing.
        rate = (samples_seen - self._samples) / elapsed if self._samples else None
        values = {
            "train/loss": result.loss,
            **{f"train/loss_stage{k}": loss for k, loss in enumerate(result.stage_losses)},
            "train/grad_norm": result.grad_norm,
            "train/lr": result.learning_rate,
            "perf/data_wait_fraction": min(1.0, (waited - self._waited) / elapsed),
            "mem/peak_gib": self._peak_memory(),
        }
        if rate is not None:
            values["perf/samples_per_second"] = rate
            if self._peak:
                values["perf/mfu"] = rate * self._flops_per_sample / self._peak
        self._since, self._samples, self._waited = now, samples_seen, waited
        return values

    def _peak_memory(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def progress_line(step: int, total_steps: int, samples_seen: int, total: int, values: dict[str, float]) -> str:
    """One line of the log: where the run is, how it goes, how long it will take."""
    stages = " ".join(f"{value:.4f}" for tag, value in values.items() if tag.startswith("train/loss_stage"))
    line = (
        f"step {step}/{total_steps}  loss {values['train/loss']:.4f} ({stages})  grad {values['train/grad_norm']:.3f}  "
        f"lr {values['train/lr']:.2e}"
    )
    if rate := values.get("perf/samples_per_second"):
        line += f"  {rate:,.0f} samples/s  data wait {values['perf/data_wait_fraction']:.0%}"
        line += f"  left {duration((total - samples_seen) / rate)}"
    return line


def duration(seconds: float) -> str:
    """3725 -> 1h02m, 95 -> 1m35s, 7 -> 7s."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
