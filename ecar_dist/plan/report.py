"""What `ecar-dist plan` prints: size, compute, memory and time of a run."""

from __future__ import annotations

from ecar_dist.command_line import counted
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.flops import FLOPS_PER_MAC, dit_macs, guidance_passes
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.duration import ASSUMED_MFU, training_seconds
from ecar_dist.plan.memory import checkpoint_bytes, model_state

DIT_XL = {"width": 1152, "depth": 28}
DIT_TOKENS = 256  # DiT-XL/2 at 256 x 256 pixels
ZERO_STAGES = (0, 1, 2, 3)


def plan_lines(config: RunConfig, world_size: int, device: str | None) -> list[str]:
    """One fact per line. `device` is a key of PEAK_BF16_FLOPS, or None for no time estimate.

    Raises ConfigError for a device without a known peak, or batch numbers that do not multiply out.
    """
    # The sizes of the parts that this kind has.
    kind = kind_of(config)
    parameters = kind.parameters(config)
    tokens = config.stage_tokens
    checkpoint = checkpoint_bytes(parameters.total)
    named = zip((parameters.ar, parameters.flow), kind.parts, strict=True)
    sizes = " + ".join(f"{_count(number)} {part}" for number, part in named if part)

    # From what the model is to what a run of it costs.
    lines = [
        f"model {config.model.kind} {config.model.preset}: {_count(parameters.total)} parameters = {sizes}",
        f"tokens per stage: {' + '.join(map(str, tokens))} = {sum(tokens)}",
        _batch_line(config, world_size),
        _training_line(config),
        *_sampling_lines(config),
        *_memory_lines(config, parameters.total, world_size),
        f"checkpoint: {_gib(checkpoint)} (fp32 weights, two moments, EMA), {config.checkpoint.keep} are kept",
    ]
    return lines if device is None else [*lines, _time_line(config, world_size, device)]


def _batch_line(config: RunConfig, world_size: int) -> str:
    accumulate = config.grad_accum_steps(world_size)
    batch = config.batch
    return (
        f"batch: {batch.global_batch_size} = {batch.micro_batch_size} micro x {accumulate} accumulation x "
        f"{counted(world_size, 'rank')}; {config.total_steps} optimizer steps"
    )


def _training_line(config: RunConfig) -> str:
    macs = kind_of(config).training_macs(config)
    total = macs * FLOPS_PER_MAC * config.train.total_samples
    return f"training: {_compute(macs)} per image, forward and backward; {total:.3g} FLOP in all"


def _sampling_lines(config: RunConfig) -> list[str]:
    sample = config.sample
    kind = kind_of(config)
    macs = kind.sampling_macs(config)
    how = f"({sample.solver}), guidance {sample.guidance_scale:g} ({sample.guidance_ramp})"
    lines = [f"sampling: {_compute(macs)} per image; {kind.describe_calls(config)} {how}"]
    if config.stage_tokens[-1] == DIT_TOKENS:
        each = dit_macs(DIT_TOKENS, **DIT_XL) * guidance_passes(sample.guidance_scale)
        guided = "both guided" if guidance_passes(sample.guidance_scale) == 2 else "both unguided"
        ratios = " and ".join(f"{steps * each / macs:.3g}x at {steps} steps" for steps in (250, 50))
        lines.append(f"DiT-XL/2 needs {ratios} as many MACs ({guided}, autoencoder left out)")
    return lines


def _memory_lines(config: RunConfig, num_parameters: int, world_size: int) -> list[str]:
    precision = "fp32" if config.deepspeed.precision == "fp32" else "bf16"
    lines = [f"model state per rank, {counted(world_size, 'rank')}, {precision}, without activations:"]
    for zero_stage in ZERO_STAGES:
        state = model_state(num_parameters, world_size, zero_stage, precision)
        chosen = "  <- this config" if zero_stage == config.deepspeed.zero_stage else ""
        lines.append(
            f"  zero_stage {zero_stage}: {_gib(state.total)} = weights {_gib(state.weights)} + gradients "
            f"{_gib(state.gradients)} + optimizer {_gib(state.optimizer)} + EMA {_gib(state.ema)}{chosen}"
        )
    return lines


def _time_line(config: RunConfig, world_size: int, device: str) -> str:
    macs = kind_of(config).training_macs(config)
    hours = training_seconds(macs, config.train.total_samples, world_size, device) / 3600
    return (
        f"time: {hours:.3g} h on {world_size} x {device.upper()}, assuming {ASSUMED_MFU:.0%} of the dense bf16 peak "
        "(an assumption, not a measurement)"
    )


def _compute(macs: int) -> str:
    """MACs, and the FLOPs of data sheets, two per MAC."""
    return f"{macs / 1e9:.4g} GMAC ({macs * FLOPS_PER_MAC / 1e9:.4g} GFLOP)"


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
