"""The effects of quantisation: sizes, memory, speed on this device, and samples from the same noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ecar_dist.command_line import columns
from ecar_dist.evaluate.paired import psnr, ssim
from ecar_dist.quantize.quantizer import sqnr
from ecar_dist.sample.generate import velocities
from ecar_dist.sample.load import TrainedModel
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.vae.pixels import to_pixels

TIMED = 2  # timed draws of one batch, after one that is not timed; the fastest counts


@dataclass(frozen=True)
class Drawn:
    """Samples of one model. latents: [N, C, h, w]; pixels: uint8 [N, H, W, 3]; velocities: K of [N, C, h_k, w_k]."""

    latents: torch.Tensor
    pixels: np.ndarray
    velocities: list[torch.Tensor]


def draw_samples(trained: TrainedModel, labels: Sequence[int], seed: int, batch_size: int) -> Drawn:
    """Samples 0, 1, 2, ... of a seed, and the network's output at inputs keyed by the same numbers."""
    last = [stages[-1] for stages in trained.draw(labels, seed, batch_size)]
    pixels = np.concatenate([to_pixels(trained.codec.decode(latents)) for latents in last])
    plan = SamplingPlan.from_config(trained.config, trained.device)
    indices = torch.arange(len(labels), device=trained.device)
    outputs = velocities(trained.model, plan, torch.tensor(labels, device=trained.device), indices, seed)
    return Drawn(torch.cat(last), pixels, outputs)


def seconds_per_batch(trained: TrainedModel, labels: Sequence[int]) -> float:
    """Seconds to draw one batch, without the autoencoder."""
    best = math.inf
    for number in range(1 + TIMED):
        began = time.perf_counter()
        for _ in trained.draw(labels, 0, len(labels)):
            pass
        if trained.device.type == "cuda":
            torch.cuda.synchronize(trained.device)
        if number:
            best = min(best, time.perf_counter() - began)
    return best


def memory_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def compare_samples(reference: Drawn, other: Drawn) -> dict[str, Any]:
    """Metrics of pairs with the same noise, labels and inputs; `None` for an infinite number."""
    numbers = {
        "SQNR of the velocity, dB": sqnr(_flat(reference.velocities), _flat(other.velocities)),
        "SQNR of the latents, dB": sqnr(reference.latents, other.latents),
        "PSNR, dB": psnr(reference.pixels, other.pixels),
        "SSIM": ssim(reference.pixels, other.pixels),
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as a table, for the screen."""
    before, after = report["before"], report["after"]
    rows = [["", "before", "after", ""]]
    for name, digits in (("file MiB", 2), ("memory MiB", 2), ("ms a batch", 1)):
        ratio = before[name] / after[name]
        rows.append([name, f"{before[name]:,.{digits}f}", f"{after[name]:,.{digits}f}", f"{ratio:.2f}x"])
    lines = columns(rows)
    paired = ", ".join(f"{name} {_shown(value)}" for name, value in report["paired"].items())
    lines.append(f"same noise, {report['images']} images: {paired}")
    return lines


def _shown(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
