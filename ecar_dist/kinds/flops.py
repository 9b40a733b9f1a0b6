"""Compute in closed form: the terms that several kinds share, docs/ecar.md eq. (17)-(19).

The unit is the MAC, one multiply-add, which DiT's paper reports as "Gflops"; FLOPS_PER_MAC = 2 turns it into the
FLOPs of a device's data sheet. Not counted: biases, norms, softmax, embedding look-ups and the autoencoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecar_dist.flow.guidance import is_guided
from ecar_dist.flow.solvers import SOLVERS
from ecar_dist.kinds.parameters import SINUSOID_WIDTH
from ecar_dist.kinds.presets import Preset

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig

FLOPS_PER_MAC = 2
TRAINING_PASSES = 3  # forward, and in the backward pass the gradients of the activations and of the weights
TARGET_PASSES = 2  # forward, of the velocity network: the two parts of an interval (flow/mean_velocity.py)


def block_macs(tokens: int, width: int, depth: int, *, keys: int | None = None, linears_only: bool = False) -> int:
    """`depth` blocks without their adaLN: `tokens` queries against `keys` (default: the tokens themselves)."""
    linears = 12 * width**2 * tokens
    attention = 0 if linears_only else 2 * tokens * (tokens if keys is None else keys) * width
    return depth * (linears + attention)


def adaln_macs(width: int, depth: int, adaln: str) -> int:
    """Modulation of one image: 6 D^2 per block, or once if shared, and 2 D^2 for the head."""
    return (6 * (depth if adaln == "per_block" else 1) + 2) * width**2


def time_macs(width: int) -> int:
    """The embedding of one time."""
    return (SINUSOID_WIDTH + width) * width


def dit_macs(tokens: int, width: int, depth: int, *, channels_in: int = 16, channels_out: int = 32) -> int:
    """One forward pass of the published DiT, eq. (17), with its time embedding and its learned variance."""
    ends = tokens * width * (channels_in + channels_out) + time_macs(width)
    return block_macs(tokens, width, depth) + adaln_macs(width, depth, "per_block") + ends


def velocity_macs(
    preset: Preset, tokens: int, token_channels: int, *, linears_only: bool = False, mean_velocity: bool = False
) -> int:
    """One call of the velocity network (models/velocity.py) at a stage of `tokens` tokens."""
    width, depth = preset.flow_width, preset.flow_depth
    ends = 2 * tokens * width * token_channels + (1 + mean_velocity) * time_macs(width)
    blocks = block_macs(tokens, width, depth, linears_only=linears_only)
    return blocks + adaln_macs(width, depth, preset.flow_adaln) + ends


def stages_macs(config: RunConfig, preset: Preset) -> list[int]:
    """One call of the velocity network in each stage."""
    mean_velocity = config.flow.learns_mean_velocity
    channels = config.token_channels
    return [velocity_macs(preset, tokens, channels, mean_velocity=mean_velocity) for tokens in config.stage_tokens]


def velocity_training_macs(config: RunConfig, preset: Preset) -> int:
    """The velocity network in all stages, without a condition: forward, backward, and its targets if it has any."""
    passes = TRAINING_PASSES + (TARGET_PASSES if config.flow.learns_mean_velocity else 0)
    return passes * sum(stages_macs(config, preset))


def velocity_calls(config: RunConfig) -> list[int]:
    """Velocity calls that the solver makes from u = 0 to u = 1, in each stage."""
    return [steps * SOLVERS[config.sample.solver].calls_per_step for steps in config.stage_steps]


def velocity_evaluations(config: RunConfig, stage: int, guidance_scale: float) -> int:
    """Velocities that the network evaluates for one image in a stage: two for each guided call."""
    sample = config.sample
    schedule = config.flow.schedule
    calls = SOLVERS[sample.solver].call_times(config.stage_steps[stage], sample.time_shift)
    times = (schedule.model_time(stage, u) for u in calls)
    passes = guidance_passes(guidance_scale)
    return sum(passes if is_guided(guidance_scale, sample.guidance_interval, time) else 1 for time in times)


def guidance_passes(guidance_scale: float) -> int:
    """Velocities evaluated for one guided velocity: 1 where the guidance formula reduces to one of its terms."""
    return 1 if guidance_scale in (0.0, 1.0) else 2
