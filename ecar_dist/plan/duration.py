"""A forecast of the time of an optimizer step, from a device's rates and assumptions that are printed with it.

The compute of a micro-batch is its matrix products at a share of the attainable rate, after the memory traffic of all
other kernels. Where that is shorter than the host needs to launch the kernels, the launches count. The shares, bytes
and kernels below are estimates by a roofline of preset XL, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.communication import BUS_EFFICIENCY, bus_bandwidth, step_traffic
from ecar_dist.plan.memory import overlaps
from ecar_dist.runtime.devices import ATTAINABLE_SHARE, DEVICES, Device, find_device

GEMM_SHARE = 0.75  # of the attainable rate: small matrices of the coarse stages and attention are slower
KEPT_BYTES = 60  # that an eager block keeps for the backward pass, per token and width, bf16
POINTWISE_BYTES = {False: 460, True: 156}  # that kernels besides matrix products move for them, by whether compiled
MEMORY_SHARE = 0.85  # of the data sheet's memory bandwidth
ROOFLINE_SHARE = 0.85  # what a roofline leaves out
KERNELS = {False: 105, True: 35}  # of a block, forward and backward, by whether compiled
OTHER_KERNELS = 500  # of a micro-batch
LAUNCH_SECONDS = 4e-6
RECOMPUTED_PASSES = 4 / 3  # one more forward pass
OPTIMIZER_BYTES = 148  # memory traffic per parameter of a partition: AdamW by foreach, EMA, norm, clip, casts
HIDDEN_SHARE = 0.7  # of the traffic that overlaps, as long as the compute lasts


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    optimizer: float
    communication: float  # all of it
    exposed: float  # what compute does not hide

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed


def model_flops_utilisation(config: RunConfig, world_size: int, seconds: float, flops: float) -> float:
    """FLOPs of a step, without recomputation, over what `world_size` devices of `flops` FLOP/s could do meanwhile."""
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
    kernels = KERNELS[compiled] * kept.block_calls + OTHER_KERNELS
    launches = config.grad_accum_steps(world_size) * kernels * LAUNCH_SECONDS
    compute = passes * max(on_device, launches)

    # The optimizer step of this rank's partition.
    partition = kind.parameters(config).total / (world_size if zero_stage else 1)
    optimizer = OPTIMIZER_BYTES * partition / memory_rate

    # Communication, and the part of it that nothing hides.
    traffic = step_traffic(config, world_size, zero_stage)
    bus = bus_bandwidth(device, world_size, gpus_per_node, bandwidth)
    during = (traffic.gradients + traffic.weights) / bus
    hidden = min(HIDDEN_SHARE * during, compute) if overlaps(config, zero_stage) else 0.0
    return StepTime(compute, optimizer, traffic.total / bus, traffic.total / bus - hidden)


def assumptions(compiled: bool) -> str:
    """What the forecast rests on, in one line."""
    return (
        f"matrix products at {GEMM_SHARE:.0%} of the attainable rate, which is {ATTAINABLE_SHARE:.0%} of the data "
        f"sheet's (measured on an H200 alone); {POINTWISE_BYTES[compiled]} bytes of other traffic per token, block and "
        f"width at {MEMORY_SHARE:.0%} of the memory bandwidth; both at {ROOFLINE_SHARE:.0%} of that roofline; "
        f"{OPTIMIZER_BYTES} bytes of traffic per parameter in the optimizer step; collectives at {BUS_EFFICIENCY:.0%} "
        f"of the links, {HIDDEN_SHARE:.0%} of their time hidden where DeepSpeed overlaps; {KERNELS[compiled]} kernels "
        f"a block and {LAUNCH_SECONDS * 1e6:g} us for each; no wait for data"
    )
