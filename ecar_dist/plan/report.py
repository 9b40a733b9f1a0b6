"""What `ecar-dist plan` prints: size, compute, memory and time of a run, before it costs anything."""

from __future__ import annotations

from ecar_dist.command_line import counted
from ecar_dist.config import RunConfig
from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.flow.solvers import CALLS_PER_STEP
from ecar_dist.models.presets import PRESETS, Preset
from ecar_dist.plan.duration import ASSUMED_MFU, training_seconds
from ecar_dist.plan.flops import (
    FLOPS_PER_MAC,
    dit_macs,
    ecar_sampling_macs,
    ecar_training_macs,
    guidance_passes,
)
from ecar_dist.plan.memory import checkpoint_bytes, model_state
from ecar_dist.plan.parameters import ecar_parameters

DIT_XL = {"width": 1152, "depth": 28}
DIT_TOKENS = 256  # DiT-XL/2 at 256 x 256 pixels
ZERO_STAGES = (0, 1, 2, 3)


def plan_lines(config: RunConfig, world_size: int, device: str | None) -> list[str]:
    """One fact a line. `device` is a name of PEAK_BF16_FLOPS, or None for no time estimate.

    Raises ConfigError for a device without a known peak, or batch numbers that do not multiply out.
    """
    parameters = ecar_parameters(
        preset_of(config),
        config.stage_tokens,
        token_channels(config),
        config.data.num_classes,
        feeds_state=feeds_state(config),
    )
    tokens, checkpoint = config.stage_tokens, checkpoint_bytes(parameters.total)
    sizes = f"{_count(parameters.ar)} AR + {_count(parameters.flow)} velocity network"
    lines = [
        f"model {config.model.preset}: {_count(parameters.total)} parameters = {sizes}",
        f"tokens per stage: {' + '.join(map(str, tokens))} = {sum(tokens)}",
        _batch_line(config, world_size),
        _training_line(config),
        *_sampling_lines(config),
        *_memory_lines(config, parameters.total, world_size),
        f"checkpoint: {_gib(checkpoint)} (fp32 weights, two moments, EMA), {config.checkpoint.keep} are kept",
    ]
    return lines if device is None else [*lines, _time_line(config, world_size, device)]


def preset_of(config: RunConfig) -> Preset:
    return PRESETS[config.model.preset]


def token_channels(config: RunConfig) -> int:
    """Numbers in one patch: C p^2."""
    return config.data.latent_channels * config.model.patch_size**2


def feeds_state(config: RunConfig) -> bool:
    return config.flow.context.mode != "class_only"


def training_macs(config: RunConfig) -> int:
    """MACs of forward and backward for one image of this run."""
    return ecar_training_macs(
        preset_of(config), config.stage_tokens, token_channels(config), feeds_state=feeds_state(config)
    )


def sampling_macs(config: RunConfig) -> int:
    """MACs for one image with the solver and the guidance of `config.sample`."""
    sample = config.sample
    calls = sample.steps_per_stage * CALLS_PER_STEP[sample.solver]
    return ecar_sampling_macs(
        preset_of(config),
        config.stage_tokens,
        token_channels(config),
        (calls,) * config.flow.num_stages,
        guidance_scales=stage_guidance_scales(sample.guidance_scale, config.flow.num_stages, sample.guidance_ramp),
        feeds_state=feeds_state(config),
    )


def _batch_line(config: RunConfig, world_size: int) -> str:
    accumulate = config.grad_accum_steps(world_size)
    batch = config.batch
    return (
        f"batch: {batch.global_batch_size} = {batch.micro_batch_size} micro x {accumulate} accumulation x "
        f"{counted(world_size, 'rank')}; {config.total_steps} optimizer steps"
    )


def _training_line(config: RunConfig) -> str:
    macs = training_macs(config)
    total = macs * FLOPS_PER_MAC * config.train.total_samples
    return f"training: {macs / 1e9:.4g} GMAC per image, forward and backward; {total:.3g} FLOP (2 per MAC) in all"


def _sampling_lines(config: RunConfig) -> list[str]:
    sample, macs = config.sample, sampling_macs(config)
    calls = sample.steps_per_stage * CALLS_PER_STEP[sample.solver]
    how = f"({sample.solver}), guidance {sample.guidance_scale:g} ({sample.guidance_ramp})"
    stages = f"{calls} velocity calls in each of {config.flow.num_stages} stages"
    lines = [f"sampling: {macs / 1e9:.4g} GMAC per image; {stages} {how}"]
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
    hours = training_seconds(training_macs(config), config.train.total_samples, world_size, device) / 3600
    return (
        f"time: {hours:.3g} h on {world_size} x {device.upper()}, assuming {ASSUMED_MFU:.0%} of the dense bf16 peak "
        "(an assumption, not a measurement)"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
