"""What the sections of gpu.sh share: the device, how much is measured on it, rows, and rates of the device."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecar_dist.runtime.devices import peak_bf16_flops

# `what` was measured, what was `found` in words, and the numbers.
Row = dict[str, Any]
BENCHMARKS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Size:
    """How much is measured on a device."""

    latent_size: int
    micro_batches: tuple[int, ...]
    seconds: float  # of one training measurement
    warm_up: int  # steps
    steps: int  # of the framework tax
    large_batch: int  # of sampling
    sampling: tuple[str, ...]  # further options of sampling.py
    matrix: int  # side of the matrix product that gives the attainable rate
    resume_preset: str
    resume_batch: int


SIZES = {
    "cuda": Size(32, (32, 64, 96), 12.0, 3, 10, 64, ("--rounds", "3", "--dit-share", "0.1"), 8192, "S", 32),
    "cpu": Size(8, (2, 4), 0.1, 1, 2, 2, ("--rounds", "1", "--dit-share", "0.01", "--latent-size", "8"), 256, "T", 2),
}


@dataclass(frozen=True)
class Run:
    """The input of a section."""

    device: torch.device
    preset: str
    work: Path
    size: Size

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def modes(self) -> tuple[str, ...]:
        """How steps run; compiling on a CPU takes too long for a dry run."""
        return ("eager", "compiled") if self.on_gpu else ("eager",)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def attempted(what: str, action: Callable[[], Row]) -> Row:
    """The row of `action`, or one that reports the failure, so that later measurements still run."""
    try:
        return {"what": what, **action()}
    except Exception as error:
        fault = f"{type(error).__name__}: {first_line(str(error))}"
    release_memory()
    return {"what": what, "found": f"FAILED: {fault}"}


def release_memory() -> None:
    """Release the device memory that earlier runs of this process used."""
    gc.collect()  # DeepSpeed's engines are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def attainable_flops(run: Run) -> float:
    """FLOP/s of a large bf16 matrix product on random numbers."""
    side = run.size.matrix
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_each(run, lambda: a @ b)


def seconds_each(run: Run, action: Callable[[], object], times: int = 10) -> float:
    for _ in range(3):
        action()
    run.wait()
    began = time.perf_counter()
    for _ in range(times):
        action()
    run.wait()
    return (time.perf_counter() - began) / times


def data_sheet_flops(run: Run) -> float | None:
    return peak_bf16_flops(torch.cuda.get_device_name()) if run.on_gpu else None


def run_command(name: str, words: Sequence[str]) -> None:
    """Run this interpreter with `words`; raises RuntimeError with the end of its error output if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"{name}: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
