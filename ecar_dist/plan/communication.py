"""Bytes that a rank exchanges in one optimizer step, by ZeRO stage, and the time that takes.

From the code of DeepSpeed 0.19, with the settings of runtime/deepspeed_config.py:
    stages 0 and 1 all-reduce the gradients once a step;
    stage 2 all-reduces them at every micro-batch, since it cuts buckets by rank only after the reduction;
    stage 3 reduce-scatters them at every micro-batch, and gathers the weights in the forward and the backward pass;
    stages 1 and 2 gather the new weights once a step.
An all-reduce moves 2 (N - 1) / N of the bytes through each rank, the other two (N - 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.activations import number_bytes
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import precision_of
from ecar_dist.runtime.devices import Device

BUS_EFFICIENCY = 0.8  # share of the links' rate, an assumption; NCCL's own benchmark prints that rate as busbw
GPUS_PER_NODE = 8
NODE_BANDWIDTH = 50.0  # GB/s per GPU between nodes: one 400 Gb/s adapter for each


@dataclass(frozen=True)
class Traffic:
    """Bytes through each rank in one optimizer step.

    gradients: sent during the backward pass, where communication may be hidden.
    weights: gathered during the passes (stage 3), where communication may also be hidden.
    update: gathered after the optimizer step, which nothing hides.
    """

    gradients: float
    weights: float
    update: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.update


def step_traffic(config: RunConfig, world_size: int, zero_stage: int) -> Traffic:
    """The traffic of a step of the config's batch, on a number of ranks that divides it."""
    parameters = kind_of(config).parameters(config)
    number = number_bytes(precision_of(config))
    once = number * parameters.total * (world_size - 1) / world_size
    micro_steps = config.grad_accum_steps(world_size)

    # Every rank has the full gradients before they are reduced.
    if zero_stage <= 1:
        return Traffic(2 * once, 0.0, once if zero_stage else 0.0)
    if zero_stage == 2:
        return Traffic(2 * once * micro_steps, 0.0, once)
    return Traffic(once * micro_steps, 2 * once * micro_steps, 0.0)


def bus_bandwidth(device: Device, world_size: int, gpus_per_node: int, bandwidth: float) -> float:
    """Bytes/s per rank of a collective over all ranks. `bandwidth` is in GB/s per GPU between nodes.

    Rings leave a node through all of its adapters at once, so the node's rate counts. The rate of the links between the
    GPUs of a node is the upper limit, and the rate if all ranks are on one node.
    """
    inside = device.link_bandwidth
    if world_size <= gpus_per_node:
        return BUS_EFFICIENCY * inside
    return BUS_EFFICIENCY * min(inside, gpus_per_node * bandwidth * 1e9)
