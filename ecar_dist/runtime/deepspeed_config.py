"""DeepSpeed's configuration, derived from the run's. Does not import torch: `ecar-dist plan` reads the bucket sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ecar_dist.config.run import RunConfig

if TYPE_CHECKING:
    from ecar_dist.runtime.world import World

# Elements of the bucket in which gradients are sent: 100 MB in bf16. DeepSpeed's default of 5e8 would send the 1.8 GB
# of XL in two pieces, so that almost no communication would overlap with the backward pass.
REDUCE_BUCKET = 50_000_000


def deepspeed_config(config: RunConfig, world: World, precision: str) -> dict[str, Any]:
    """DeepSpeed's own configuration; `deepspeed.raw` is merged last."""
    zero_stage = config.deepspeed.zero_stage
    bf16 = precision == "bf16"

    # Sharding. Small buckets, so that one can be sent while the backward pass fills the next.
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": world.device.type == "cuda",
        "reduce_bucket_size": REDUCE_BUCKET,
    }

    # Offload.
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_params:
        zero["offload_param"] = {"device": "cpu"}

    # The three batch numbers multiply out, or `grad_accum_steps` raises. DeepSpeed would use the gradient norm to clip,
    # and to look for gradients that are not finite. The guarded optimizer does both without a host read.
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world.size),
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "steps_per_print": 2**31,
        # This timer waits for the device twice in each micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }

    # Gradients of micro-batches are accumulated in fp32, which ZeRO 0 cannot do.
    if bf16 and zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(settings, config.deepspeed.raw)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
