"""A forecast of the time of an optimizer step, from a device's rates and assumptions that are printed with it.

The compute time of a micro-batch is that of its matrix products at a share of the attainable rate, plus that of the
memory traffic of all other kernels. If the host needs longer to launch the kernels, the launches count instead. The
shares, bytes and kernels below are roofline estimates for preset XL, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.activations import Activations
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.communication import BUS_EFFICIENCY, bus_bandwidth, step_traffic
from ecar_dist.plan.memory import num_emas, overlaps
from ecar_dist.runtime.devices import ATTAINABLE_SHARE, DEVICES, Device, find_device

GEMM_SHARE = 0.85  # of the attainable rate: attention is slower; all stages are in one pass, so matrices are large
KEPT_BYTES = 60  # that an eager block keeps for the backward pass, per token and width, bf16
POINTWISE_BYTES = {False: 460, True: 156}  # moved per KEPT_BYTES by kernels other than matrix products; key: compiled
MEMORY_SHARE = 0.85  # of the data sheet's memory bandwidth
ROOFLINE_SHARE = 0.85  # for what a roofline leaves out
# Forward and backward, key: compiled. Kernels of a block, and of each segment of its tokens that has its own
# conditioning. The eager ones were counted on a CPU in bf16, to within 20 %; the compiled ones are an estimate.
BLOCK_KERNELS = {False: 40, True: 27}
SEGMENT_KERNELS = {False: 60, True: 8}
OTHER_KERNELS = 540  # of a micro-batch of three stages, counted likewise
LAUNCH_SECONDS = 4e-6
RECOMPUTED_PASSES = 4 / 3  # one more forward pass
HIDDEN_SHARE = 0.7  # of the time of overlapping traffic, at most the time of the compute

# Memory traffic of ZeRO-2 in bf16, in bytes, from the code of DeepSpeed 0.19 and of torch's fused AdamW.
WHOLE_BYTES = {  # of a micro-batch, per parameter
    "copy of a gradient to its bucket": 2 + 2,
    "division of the bucket by the ranks": 2 + 2,
    "flattening of the bucket": 2 + 2,
}
PARTITION_BYTES = {  # of a micro-batch, per parameter of this rank's partition
    "copy of the reduced gradient": 2 + 2,
    "cast to fp32": 2 + 4,
    "addition to the sum": 4 + 4 + 4,
}
STEP_BYTES = {  # of a step, per parameter of this rank's partition
    "zeros for the sum": 4,
    "norm in fp64": 4 + 8 + 8,
    "AdamW: gradient, weight and two moments, read, clipped and written": 16 + 16,
    "cast of the weight": 4 + 2,
}
EMA_BYTES = 4 + 4 + 4  # of a step, for each EMA: average and weight in, average out


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    optimizer: float  # and the copies of gradients to and from buckets
    communication: float  # all of it
    exposed: float  # what compute does not hide

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed


def model_flops_utilisation(config: RunConfig, world_size: int, seconds: float, flops: float) -> float:
    """FLOPs of a step, without recomputation, over the most that `world_size` devices of `flops` FLOP/s could do."""
    step = FLOPS_PER_MAC * kind_of(config).training_macs(config) * config.batch.global_batch_size
    return step / (seconds * flops * world_size)


def known_device(name: str) -> Device:
    """Raises ConfigError for an unknown device."""
    device = find_device(name)
    if device is None:
        raise ConfigError(f"device {name!r} has no known peak; use one of {', '.join(DEVICES)}, or leave --device out")
    return device


def step_time(
    config: RunConfig,
    world_size: int,
    device: Device,
    *,
    zero_stage: int,
    compiled: bool,
    gpus_per_node: int,
    bandwidth: float,
) -> StepTime:
    """One step of the config's global batch in bf16. `bandwidth` is in GB/s per GPU between nodes."""
    kind = kind_of(config)
    images = config.batch.global_batch_size / world_size
    memory_rate = MEMORY_SHARE * device.memory_bandwidth

    # Forward and backward of this rank's images. Recomputed blocks run forward twice.
    passes = RECOMPUTED_PASSES if config.train.activation_checkpointing else 1.0
    kept = kind.activations(config, "bf16")
    products = FLOPS_PER_MAC * kind.training_macs(config) / (GEMM_SHARE * device.attainable_flops)
    pointwise = POINTWISE_BYTES[compiled] / KEPT_BYTES * (kept.blocks + kept.rest) / memory_rate
    on_device = images * (products + pointwise) / ROOFLINE_SHARE
    launches = config.grad_accum_steps(world_size) * _kernels(kept, compiled) * LAUNCH_SECONDS
    compute = passes * max(on_device, launches)

    # The copies and sums of gradients, and the optimizer step of this rank's partition.
    optimizer = _optimizer_bytes(config, world_size, zero_stage) / memory_rate

    # Communication, and the part of it that nothing hides.
    traffic = step_traffic(config, world_size, zero_stage)
    bus = bus_bandwidth(device, world_size, gpus_per_node, bandwidth)
    during = (traffic.gradients + traffic.weights) / bus
    hidden = min(HIDDEN_SHARE * during, compute) if overlaps(config, zero_stage) else 0.0
    return StepTime(compute, optimizer, traffic.total / bus, traffic.total / bus - hidden)


def _kernels(calls: Activations, compiled: bool) -> int:
    """Kernels of one micro-batch, forward and backward."""
    blocks = BLOCK_KERNELS[compiled] * calls.block_calls + SEGMENT_KERNELS[compiled] * calls.block_segments
    return blocks + OTHER_KERNELS


def _optimizer_bytes(config: RunConfig, world_size: int, zero_stage: int) -> float:
    """Memory traffic of a rank besides forward and backward, in one step. Other stages are treated like stage 2."""
    total = kind_of(config).parameters(config).total
    partition = total / (world_size if zero_stage else 1)
    micro_batch = sum(WHOLE_BYTES.values()) * total + sum(PARTITION_BYTES.values()) * partition
    step = (sum(STEP_BYTES.values()) + num_emas(config) * EMA_BYTES) * partition
    return config.grad_accum_steps(world_size) * micro_batch + step


def assumptions(compiled: bool) -> str:
    """The assumptions of the forecast, in one line."""
    buckets, partition, step = (sum(each.values()) for each in (WHOLE_BYTES, PARTITION_BYTES, STEP_BYTES))
    return (
        f"matrix products at {GEMM_SHARE:.0%} of the attainable rate, which is {ATTAINABLE_SHARE:.0%} of the data "
        f"sheet's (measured only on an H200); {POINTWISE_BYTES[compiled]} bytes of other traffic per token, block and "
        f"width at {MEMORY_SHARE:.0%} of the memory bandwidth; both at {ROOFLINE_SHARE:.0%} of that roofline; "
        f"{buckets} bytes of traffic per parameter and micro-batch for buckets, and per parameter of a rank's "
        f"partition {partition} per micro-batch, {step} per step and {EMA_BYTES} per EMA; collectives at "
        f"{BUS_EFFICIENCY:.0%} of the links, {HIDDEN_SHARE:.0%} of their time hidden where DeepSpeed overlaps; "
        f"{BLOCK_KERNELS[compiled]} kernels a block and {SEGMENT_KERNELS[compiled]} for each segment of its tokens, "
        f"{LAUNCH_SECONDS * 1e6:g} us for each; no wait for data"
    )
