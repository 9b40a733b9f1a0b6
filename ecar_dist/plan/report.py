"""What `ecar-dist plan` prints: size, compute, memory and time of a run."""

from __future__ import annotations

from ecar_dist.command_line import counted
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.flops import FLOPS_PER_MAC, dit_macs, guidance_passes
from ecar_dist.kinds.parameters import ParameterCount
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.activations import COMPILED_SHARE, activation_bytes
from ecar_dist.plan.communication import GPUS_PER_NODE, NODE_BANDWIDTH, step_traffic
from ecar_dist.plan.duration import StepTime, assumptions, known_device, model_flops_utilisation, step_time
from ecar_dist.plan.memory import (
    RESERVE,
    DeviceMemory,
    capacity,
    checkpoint_bytes,
    device_memory,
    host_bytes,
    model_state,
    num_emas,
    precision_of,
)
from ecar_dist.runtime.devices import ATTAINABLE_SHARE, Device

DIT_XL = {"width": 1152, "depth": 28}
DIT_TOKENS = 256  # DiT-XL/2 at 256 x 256 pixels
ZERO_STAGES = (0, 1, 2, 3)
MODES = ("eager", "compiled", "recomputed")  # of the transformer blocks

# Seconds between checkpoints below which a plan warns: on many GPUs `every_samples` pass quickly.
_FREQUENT_SAVES = 60.0


def plan_lines(
    config: RunConfig,
    world_size: int,
    device: str | None,
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    bandwidth: float = NODE_BANDWIDTH,
) -> list[str]:
    """One fact per line. `device` is a key of DEVICES, or None to leave out fit and time.

    `bandwidth` is in GB/s per GPU between nodes. Raises ConfigError for an unknown device, or batch numbers that do not
    multiply out.
    """
    # The sizes of the parts that this kind has.
    kind = kind_of(config)
    parameters = kind.parameters(config)
    tokens = config.stage_tokens
    checkpoint = checkpoint_bytes(parameters.total, num_emas(config))
    named = zip((parameters.ar, parameters.flow), kind.parts, strict=True)
    sizes = " + ".join(f"{_count(number)} {part}" for number, part in named if part)

    # From the size of the model to the cost of a run.
    lines = [
        f"model {config.model.kind} {config.model.preset}: {_count(parameters.total)} parameters = {sizes}",
        f"tokens per stage: {' + '.join(map(str, tokens))} = {sum(tokens)}",
        _batch_line(config, world_size),
        _training_line(config),
        *_sampling_lines(config),
        *_state_lines(config, parameters.total, world_size),
        *_memory_lines(config, parameters, world_size),
        f"checkpoint: {gib(checkpoint)} (fp32 weights, two moments, EMA), {config.checkpoint.keep} are kept",
        *_quantized_lines(parameters),
    ]

    # The lines that depend on the device.
    if device is None:
        return lines
    known = known_device(device)
    return [
        *lines,
        *_fit_lines(config, world_size, device, known),
        *_time_lines(config, world_size, device, known, gpus_per_node, bandwidth),
    ]


def _quantized_lines(parameters: ParameterCount) -> list[str]:
    """Files of `ecar-dist quantize`. Other layers are fp32; the scales, one number for each row, are not counted."""
    rounded, rest = parameters.quantized, parameters.total - parameters.quantized
    if not rounded:
        return []
    eight, four = (gib(rounded * bits // 8 + rest * 4) for bits in (8, 4))
    return [f"quantised: {eight} with 8-bit weights, {four} with 4-bit, of {gib(parameters.total * 4)} in fp32"]


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
    return f"training: {_compute(macs)} per image, forward and backward; {total:.3g} FLOP in total"


def _sampling_lines(config: RunConfig) -> list[str]:
    sample = config.sample
    kind = kind_of(config)
    macs = kind.sampling_macs(config)
    shift = f", time shift {sample.time_shift:g}" if sample.time_shift != 1.0 else ""
    how = f"({sample.solver}{shift}), guidance {sample.guidance_scale:g} ({sample.guidance_ramp})"
    lines = [f"sampling: {_compute(macs)} per image; {kind.describe_calls(config)} {how}"]
    if config.stage_tokens[-1] == DIT_TOKENS:
        each = dit_macs(DIT_TOKENS, **DIT_XL) * guidance_passes(sample.guidance_scale)
        guided = "both guided" if guidance_passes(sample.guidance_scale) == 2 else "both unguided"
        ratios = " and ".join(f"{steps * each / macs:.3g}x at {steps} steps" for steps in (250, 50))
        lines.append(f"DiT-XL/2 needs {ratios} as many MACs ({guided}, autoencoder left out)")
    return lines


def _state_lines(config: RunConfig, num_parameters: int, world_size: int) -> list[str]:
    precision = precision_of(config)
    lines = [f"model state per rank, {counted(world_size, 'rank')}, {precision}, without activations and buckets:"]
    for zero_stage in ZERO_STAGES:
        state = model_state(num_parameters, world_size, zero_stage, precision, num_emas(config))
        chosen = "  <- this config" if zero_stage == config.deepspeed.zero_stage else ""
        lines.append(
            f"  zero_stage {zero_stage}: {gib(state.total)} = weights {gib(state.weights)} + gradients "
            f"{gib(state.gradients)} + optimizer {gib(state.optimizer)} + EMA {gib(state.ema)}{chosen}"
        )
    return lines


def _memory_lines(config: RunConfig, parameters: ParameterCount, world_size: int) -> list[str]:
    """What the backward pass adds to the state, and what the host needs."""
    precision = precision_of(config)
    eager, compiled, recomputed = (_kept(config, precision, mode) for mode in MODES)
    memory = _memory(config, world_size, config.train.activation_checkpointing)
    building, saving = host_bytes(parameters, world_size, config.deepspeed.zero_stage, num_emas(config))
    kept = f"{gib(eager)} eager, {gib(compiled)} compiled, {gib(recomputed)} recomputed"
    return [
        f"activations per image, {precision}: {kept} (a compiled block keeps {COMPILED_SHARE:.0%}, measured on one)",
        f"also in the backward pass: {gib(memory.backward)} of gradients of a block, buckets and gathered weights",
        f"host memory per rank: {gib(building)} while the model is built, {gib(saving)} for the copy of a save",
    ]


def _kept(config: RunConfig, precision: str, mode: str) -> int:
    return activation_bytes(config, precision, compiled=mode == "compiled", recompute=mode == "recomputed")


def _memory(config: RunConfig, world_size: int, recompute: bool, *, compiled: bool | None = None) -> DeviceMemory:
    return device_memory(
        config,
        world_size,
        zero_stage=config.deepspeed.zero_stage,
        compiled=config.compiles_on("cuda") if compiled is None else compiled,
        recompute=recompute,
    )


def _fit_lines(config: RunConfig, world_size: int, name: str, device: Device) -> list[str]:
    """Whether the config fits, and the largest micro-batches that do."""
    micro = config.batch.micro_batch_size
    usable = capacity(device)
    needed = _memory(config, world_size, config.train.activation_checkpointing).total(micro)
    answer = "fits" if needed <= usable else "does not fit"
    largest = [
        f"{_memory(config, world_size, mode == 'recomputed', compiled=mode == 'compiled').largest_micro_batch(usable)}"
        f" {mode}"
        for mode in MODES
    ]
    limit = f"{device.memory / 1e9:g} GB less {gib(RESERVE)} for context and libraries"
    return [
        f"memory at micro-batch {micro}: {gib(needed)} of {gib(usable)} on an {name.upper()} ({limit}): {answer}",
        f"largest micro-batch: {', '.join(largest)} (computed, not measured)",
    ]


def _time_lines(
    config: RunConfig, world_size: int, name: str, device: Device, gpus_per_node: int, bandwidth: float
) -> list[str]:
    """Communication against compute for each ZeRO stage, then step, MFU and the length of the run."""
    if precision_of(config) == "fp32":
        return ["time: no forecast in fp32, whose rate on GPUs is not known here"]
    compiled = config.compiles_on("cuda")
    times = {
        zero_stage: step_time(
            config,
            world_size,
            device,
            zero_stage=zero_stage,
            compiled=compiled,
            gpus_per_node=gpus_per_node,
            bandwidth=bandwidth,
        )
        for zero_stage in ZERO_STAGES
    }
    return [
        f"communication per step, {counted(gpus_per_node, 'GPU')} per node, {bandwidth:g} GB/s per GPU between nodes:",
        *(_communication_line(config, world_size, zero_stage, time) for zero_stage, time in times.items()),
        *_step_lines(config, world_size, name, device, times[config.deepspeed.zero_stage]),
        f"forecast, not a measurement; assumed: {'compiled' if compiled else 'eager'} blocks; {assumptions(compiled)}",
    ]


def forecast_step(
    config: RunConfig, world_size: int, device: str | None, *, gpus_per_node: int, bandwidth: float
) -> StepTime | None:
    """The time of a step; None without a device or in fp32. Raises ConfigError for an unknown device."""
    if device is None or precision_of(config) == "fp32":
        return None
    return step_time(
        config,
        world_size,
        known_device(device),
        zero_stage=config.deepspeed.zero_stage,
        compiled=config.compiles_on("cuda"),
        gpus_per_node=gpus_per_node,
        bandwidth=bandwidth,
    )


def _communication_line(config: RunConfig, world_size: int, zero_stage: int, time: StepTime) -> str:
    gigabytes = step_traffic(config, world_size, zero_stage).total / 1e9
    chosen = "  <- this config" if zero_stage == config.deepspeed.zero_stage else ""
    return (
        f"  zero_stage {zero_stage}: {gigabytes:.3g} GB, {_seconds(time.communication)} alongside "
        f"{_seconds(time.compute)} of compute, {_seconds(time.exposed)} not hidden{chosen}"
    )


def _step_lines(config: RunConfig, world_size: int, name: str, device: Device, step: StepTime) -> list[str]:
    """One step, its MFU by both rates, and the whole run."""
    parts = {"compute": step.compute, "buckets and optimizer": step.optimizer, "communication": step.exposed}
    sheet = model_flops_utilisation(config, world_size, step.total, device.peak_flops)
    by_sheet = f"{sheet:.0%} of the data sheet's {device.peak_flops / 1e12:.0f} TFLOP/s"
    by_attainable = f"{sheet / ATTAINABLE_SHARE:.0%} of the attainable {device.attainable_flops / 1e12:.0f}"
    hours = config.total_steps * step.total / 3600
    lines = [
        f"step: {_seconds(step.total)} = {' + '.join(f'{_seconds(each)} {part}' for part, each in parts.items())}",
        f"MFU: {by_sheet}, as in perf/mfu, and {by_attainable}",
        f"time: {hours:.3g} h, {hours * world_size:.3g} GPU hours on {world_size} x {name.upper()}, training alone",
    ]
    return [f"{line} (forecast)" for line in [*lines, _save_line(config, step.total)]]


def _save_line(config: RunConfig, step_seconds: float) -> str:
    """Seconds between two checkpoints, with a warning if the run would be saving all the time."""
    section = config.checkpoint
    batch = config.batch.global_batch_size
    by_samples = -(-section.every_samples // batch) * step_seconds
    between = max(by_samples, section.min_seconds)
    warning = "; that is too often: set checkpoint.min_seconds=600" if between < _FREQUENT_SAVES else ""
    return f"checkpoints: one every {_seconds(between)}{warning}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _compute(macs: int) -> str:
    """MACs, and the FLOPs of data sheets, two per MAC."""
    return f"{macs / 1e9:.4g} GMAC ({macs * FLOPS_PER_MAC / 1e9:.4g} GFLOP)"


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
