"""Bytes on a device and in host memory, as DeepSpeed 0.19 lays them out with the settings of deepspeed_config.py.

ZeRO (Rajbhandari et al., arXiv 1910.02054) divides optimizer state (stage 1), gradients (2) and weights (3) over the
ranks. Three things differ from the paper's 16 bytes per parameter. Gradients are added up in fp32. Stage 1 in bf16
keeps them in full on every rank, in addition to the bf16 gradients. And the EMAs are divided like the optimizer state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.activations import number_bytes
from ecar_dist.kinds.parameters import ParameterCount
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.activations import activation_bytes
from ecar_dist.runtime.deepspeed_config import REDUCE_BUCKET
from ecar_dist.runtime.devices import Device

FP32 = 4
MOMENTS = 2  # of AdamW

# DeepSpeed's defaults, in parameters.
LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
UNSHARDED_BUCKET = 500_000_000  # of the all-reduce of stages 0 and 1

# CUDA context, NCCL and libraries. Fragmentation has no term of its own: a device of N GB reports about N GiB, which is
# 7 % more than is counted here.
RESERVE = 3 << 29


@dataclass(frozen=True)
class ModelState:
    """Bytes per rank, between the last backward pass of a step and its optimizer step."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. The backward pass and what comes after it do not overlap, so the larger one counts.

    backward: gradients that are in no bucket yet, buckets, gathered weights.
    image: activations of one image.
    after: copies in the optimizer step.
    """

    state: ModelState
    backward: int
    image: int
    after: int

    def total(self, micro_batch: int) -> int:
        return self.state.total + max(self.backward + self.image * micro_batch, self.after)

    def largest_micro_batch(self, capacity: int) -> int:
        """The largest micro-batch, in images, that fits in `capacity` bytes; 0 if nothing fits."""
        if self.total(0) > capacity:
            return 0
        return (capacity - self.state.total - self.backward) // self.image


def capacity(device: Device) -> int:
    """Bytes of a device that training can use."""
    return device.memory - RESERVE


def precision_of(config: RunConfig) -> str:
    """The precision on a GPU: `bf16` or `fp32`."""
    return config.precision_on("cuda")


def zero_setting(config: RunConfig, name: str, default: int) -> int:
    """A number of DeepSpeed's section zero_optimization, which `deepspeed.raw` may set."""
    value = (config.deepspeed.raw.get("zero_optimization") or {}).get(name, default)
    return int(value) if isinstance(value, int | float) else default


def fills_buckets(config: RunConfig, zero_stage: int) -> bool:
    """Whether DeepSpeed reduces gradients in buckets, as the backward pass makes them.

    Without ZeRO, and in bf16 with ZeRO-1 but without offload, it uses a different optimizer, which reduces all of them
    after the backward pass.
    """
    if zero_stage == 1:
        return precision_of(config) == "fp32" or config.deepspeed.offload_optimizer
    return zero_stage >= 2


def overlaps(config: RunConfig, zero_stage: int) -> bool:
    """Whether communication overlaps with compute."""
    return fills_buckets(config, zero_stage) and bool(zero_setting(config, "overlap_comm", True))


def num_emas(config: RunConfig) -> int:
    return len(config.ema.half_life_samples) + len(config.ema.sigma_rel)


def model_state(num_parameters: int, world_size: int, zero_stage: int, precision: str, emas: int = 1) -> ModelState:
    """State of one rank; `precision` is `bf16` or `fp32`."""

    def share(bytes_each: int, *, divided_from: int) -> int:
        return bytes_each * math.ceil(num_parameters / (world_size if zero_stage >= divided_from else 1))

    # Gradients: those of the backward pass, or the fp32 sums of micro-batches; ZeRO-1 in bf16 has both in full.
    number = number_bytes(precision)
    gradient = number if zero_stage == 0 else FP32
    if zero_stage == 1 and precision == "bf16":
        gradient += number

    # Without ZeRO, in fp32, the weights are their own master weights.
    master = 0 if precision == "fp32" and zero_stage == 0 else FP32
    return ModelState(
        weights=share(number, divided_from=3),
        gradients=share(gradient, divided_from=2),
        optimizer=share(master + MOMENTS * FP32, divided_from=1),
        ema=share(emas * FP32, divided_from=1),
    )


def device_memory(
    config: RunConfig, world_size: int, *, zero_stage: int, compiled: bool, recompute: bool
) -> DeviceMemory:
    """What training needs on each device, from the config except for the three settings that are passed."""
    precision = precision_of(config)
    parameters = kind_of(config).parameters(config)
    state = model_state(parameters.total, world_size, zero_stage, precision, num_emas(config))
    return DeviceMemory(
        _without_offload(config, state, zero_stage),
        _backward_bytes(config, zero_stage, precision),
        activation_bytes(config, precision, compiled=compiled, recompute=recompute),
        _after_bytes(config, zero_stage, precision),
    )


def _without_offload(config: RunConfig, state: ModelState, zero_stage: int) -> ModelState:
    """DeepSpeed offloads gradients that it has divided together with the optimizer state."""
    to_host = config.deepspeed.offload_optimizer and zero_stage > 0
    return ModelState(
        weights=0 if config.deepspeed.offload_params and zero_stage == 3 else state.weights,
        gradients=0 if to_host and zero_stage >= 2 else state.gradients,
        optimizer=0 if to_host else state.optimizer,
        ema=0 if to_host else state.ema,
    )


def _backward_bytes(config: RunConfig, zero_stage: int, precision: str) -> int:
    """Bytes besides the activations: gradients on their way to a bucket, buckets and gathered weights."""
    number = number_bytes(precision)
    parameters = kind_of(config).parameters(config)

    # Each weight has one gradient, which is copied to the bucket, or added to its sum, as soon as it exists. A compiled
    # block produces all its gradients together.
    block = number * parameters.block
    if not fills_buckets(config, zero_stage):
        return block

    # A bucket is flattened into a copy to be sent.
    bucket = zero_setting(config, "reduce_bucket_size", REDUCE_BUCKET)
    sent = min(bucket, parameters.total)
    # ZeRO-3 has one bucket, and the weights that it has gathered.
    if zero_stage == 3:
        live = zero_setting(config, "stage3_max_live_parameters", LIVE_PARAMETERS)
        live += zero_setting(config, "stage3_prefetch_bucket_size", PREFETCH)
        return block + number * (bucket + sent + min(live, parameters.total))
    # ZeRO-2 fills a second one meanwhile, if it overlaps. The buckets of ZeRO-1 contain the sums, which are fp32.
    filled = 2 if overlaps(config, zero_stage) else 1
    return block + (number if zero_stage == 2 else FP32) * (filled * bucket + sent)


def _after_bytes(config: RunConfig, zero_stage: int, precision: str) -> int:
    """What the optimizer step needs, after the activations have been freed.

    AdamW is one kernel, and the gathered weights are written in place: neither needs a copy. Nor does a preview, for
    which weights and EMA are swapped.
    """
    total = kind_of(config).parameters(config).total
    number = number_bytes(precision)

    # Without buckets the gradients are flattened and cast before they are reduced. Stage 0 in bf16 then makes fp32
    # ones.
    step = 0
    if not fills_buckets(config, zero_stage):
        step = (number + FP32 * zero_stage) * min(total, UNSHARDED_BUCKET)
    if zero_stage == 0 and precision == "bf16":
        step += FP32 * total
    return step


def host_bytes(parameters: ParameterCount, world_size: int, zero_stage: int, emas: int = 1) -> tuple[int, int]:
    """Bytes in host memory of one rank: the fp32 weights while the model is built, and the copy that a save takes.

    ZeRO-3 splits each module over the ranks as soon as it is built; none is larger than a block.
    """
    built = parameters.block if zero_stage == 3 else parameters.total
    return FP32 * built, math.ceil(checkpoint_bytes(parameters.total, emas) / world_size)


def checkpoint_bytes(num_parameters: int, emas: int = 1) -> int:
    """A checkpoint of all ranks: fp32 weights, moments and EMAs, at any ZeRO stage and precision."""
    return FP32 * (1 + MOMENTS + emas) * num_parameters
