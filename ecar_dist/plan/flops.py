"""Compute per image in closed form, docs/ecar.md eq. (17)-(19).

The unit is the MAC, one multiply-add, which is what DiT's paper prints as "Gflops"; FLOPS_PER_MAC = 2 turns it into the
FLOPs of a device's data sheet. Attention counts the blocks that the mask leaves visible. Biases, norms, softmax,
embedding look-ups and the autoencoder are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ecar_dist.models.presets import Preset
from ecar_dist.plan.parameters import SINUSOID_WIDTH

FLOPS_PER_MAC = 2
BACKWARD_PER_FORWARD = 2  # one pass for the gradient of activations, one for that of weights


def block_macs(tokens: int, width: int, depth: int, *, keys: int | None = None, linears_only: bool = False) -> int:
    """`depth` blocks without their adaLN: `tokens` queries against `keys` (default: the tokens themselves)."""
    linears = 12 * width**2 * tokens
    attention = 0 if linears_only else 2 * tokens * (tokens if keys is None else keys) * width
    return depth * (linears + attention)


def adaln_macs(width: int, depth: int, adaln: str) -> int:
    """Modulation of one image: 6 D^2 a block, or once where shared, and 2 D^2 for the head."""
    return (6 * (depth if adaln == "per_block" else 1) + 2) * width**2


def dit_macs(tokens: int, width: int, depth: int, *, channels_in: int = 16, channels_out: int = 32) -> int:
    """One forward pass of DiT, eq. (17), including its time embedding and its learned variance."""
    ends = tokens * width * (channels_in + channels_out) + (SINUSOID_WIDTH + width) * width
    return block_macs(tokens, width, depth) + adaln_macs(width, depth, "per_block") + ends


def velocity_macs(preset: Preset, tokens: int, token_channels: int, *, linears_only: bool = False) -> int:
    """One call of the velocity network at a stage of `tokens` tokens."""
    width, depth = preset.flow_width, preset.flow_depth
    ends = 2 * tokens * width * token_channels + (SINUSOID_WIDTH + width) * width
    blocks = block_macs(tokens, width, depth, linears_only=linears_only)
    return blocks + adaln_macs(width, depth, preset.flow_adaln) + ends


def ar_macs(
    preset: Preset,
    stage_tokens: Sequence[int],
    token_channels: int,
    *,
    passes: int = 1,
    feeds_state: bool = True,
    linears_only: bool = False,
) -> int:
    """All token maps of one image, eq. (18), in `passes` passes: 1 in training, one a stage with a KV cache."""
    width, depth = preset.ar_width, preset.ar_depth
    visible = accumulate(stage_tokens)
    blocks = (
        block_macs(tokens, width, depth, keys=keys, linears_only=linears_only)
        for tokens, keys in zip(stage_tokens, visible, strict=True)
    )
    inputs = sum(stage_tokens[1:]) * token_channels * width if feeds_state else 0
    return sum(blocks) + passes * adaln_macs(width, depth, "shared") + inputs


def condition_macs(preset: Preset, tokens: int) -> int:
    """W_m M_k, once a stage."""
    return tokens * preset.ar_width * preset.flow_width


def ecar_sampling_macs(
    preset: Preset,
    stage_tokens: Sequence[int],
    token_channels: int,
    calls_per_stage: Sequence[int],
    *,
    guidance_scales: Sequence[float] | None = None,
    feeds_state: bool = True,
) -> int:
    """One image, eq. (19): every stage's token map, and `calls_per_stage` velocity calls (None guides nothing).

    A stage whose guidance scale is neither 0 nor 1 needs the conditional and the null velocity. If any does, the AR
    transformer runs twice at every stage, because later null stages attend to the earlier ones.
    """
    branches = [guidance_passes(scale) for scale in guidance_scales or (1.0,) * len(stage_tokens)]
    ar = ar_macs(preset, stage_tokens, token_channels, passes=len(stage_tokens), feeds_state=feeds_state)
    flow = sum(
        count * (calls * velocity_macs(preset, tokens, token_channels) + condition_macs(preset, tokens))
        for tokens, calls, count in zip(stage_tokens, calls_per_stage, branches, strict=True)
    )
    return max(branches) * ar + flow


def guidance_passes(guidance_scale: float) -> int:
    """Velocities evaluated for one guided velocity: 1 where the guidance formula reduces to one of its terms."""
    return 1 if guidance_scale in (0.0, 1.0) else 2


def ecar_training_macs(
    preset: Preset, stage_tokens: Sequence[int], token_channels: int, *, feeds_state: bool = True
) -> int:
    """Forward and backward of one image: one AR pass, one velocity call a stage, unmasked blocks only."""
    flow = sum(
        velocity_macs(preset, tokens, token_channels) + condition_macs(preset, tokens) for tokens in stage_tokens
    )
    forward = ar_macs(preset, stage_tokens, token_channels, feeds_state=feeds_state) + flow
    return (1 + BACKWARD_PER_FORWARD) * forward
