"""What a long job on many GPUs loses to checkpoints and failures, and the energy that it needs at most.

With a checkpoint every T seconds that stops training for d seconds, and a failure every M seconds that loses half an
interval and r seconds until training continues, the share of useful time is to first order

    goodput = 1 - d / T - (T / 2 + r) / M                         (Young, CACM 17(9), 1974)

which is largest at T = sqrt(2 d M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import checkpoint_bytes, num_emas

# 419 unexpected interruptions of 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4).
GPU_HOURS_A_FAILURE = 50_000.0
RESTART_SECONDS = 300.0  # to notice a failure, requeue the job and start it; an assumption
COPY_RATE = 20e9  # bytes/s from a GPU to pinned host memory; an assumption, PCIe 4 x16 has 32
STORAGE_RATE = 2.0  # GB/s of a node to and from storage; an assumption
# Watts per GPU, from a node's data sheet: DGX A100 6.5 kW, DGX H100 and H200 10.2 kW at most, for 8 GPUs.
WATTS = {"A100": 812.0, "H100": 1275.0, "H200": 1275.0}


@dataclass(frozen=True)
class SaveTimes:
    """Seconds between two checkpoints, that training stops for one, to write one, and to restore one."""

    between: float
    stall: float
    write: float
    restore: float


def save_times(
    config: RunConfig, world_size: int, step_seconds: float, gpus_per_node: int, storage_rate: float
) -> SaveTimes:
    """The times for a run on `world_size` ranks. `storage_rate` is in bytes/s of a node.

    In a restore each node reads its part; into a different ZeRO stage, each node reads nearly everything.
    """
    batch = config.batch.global_batch_size
    by_samples = -(-config.checkpoint.every_samples // batch) * step_seconds
    between = max(by_samples, config.checkpoint.min_seconds)

    # The ranks copy their parts to the host. Then the nodes write them, while training continues.
    nbytes = checkpoint_bytes(kind_of(config).parameters(config).total, num_emas(config))
    nodes = math.ceil(world_size / gpus_per_node)
    transfer = nbytes / nodes / storage_rate
    copy = nbytes / world_size / COPY_RATE
    waits = transfer if not config.checkpoint.overlap else max(0.0, transfer - between)
    return SaveTimes(between, copy + waits, transfer, transfer)


def seconds_between_failures(world_size: int, gpu_hours: float = GPU_HOURS_A_FAILURE) -> float:
    """Mean time between failures of a job of `world_size` GPUs."""
    return gpu_hours / world_size * 3600


def goodput(saves: SaveTimes, failures: float) -> float:
    """The share of useful time, at least 0, by the formula above. `failures`: seconds between them."""
    lost = saves.between / 2 + saves.write + RESTART_SECONDS + saves.restore
    return max(0.0, 1 - saves.stall / saves.between - lost / failures)


def best_interval(saves: SaveTimes, failures: float) -> float:
    """Seconds between checkpoints with the least loss, by the formula above."""
    return math.sqrt(2 * saves.stall * failures)
