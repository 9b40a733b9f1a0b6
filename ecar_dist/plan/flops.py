"""Compute per image in closed form, docs/ecar.md eq. (17)-(19).

The unit is the MAC, one multiply-add, which is what DiT's paper prints as "Gflops"; FLOPS_PER_MAC = 2 turns it into the
FLOPs of a device's data sheet. Attention counts the blocks that the mask leaves visible. Biases, norms, softmax,
embedding look-ups and the autoencoder are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ecar_dist.models.presets import MaskedSize, Preset
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
    ends = tokens * width * (channels_in + channels_out) + time_macs(width)
    return block_macs(tokens, width, depth) + adaln_macs(width, depth, "per_block") + ends


def time_macs(width: int) -> int:
    """The embedding of one time."""
    return (SINUSOID_WIDTH + width) * width


def velocity_macs(preset: Preset, tokens: int, token_channels: int, *, linears_only: bool = False) -> int:
    """One call of the velocity network at a stage of `tokens` tokens."""
    width, depth = preset.flow_width, preset.flow_depth
    ends = 2 * tokens * width * token_channels + time_macs(width)
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


def pyramid_sampling_macs(
    preset: Preset,
    stage_tokens: Sequence[int],
    token_channels: int,
    calls_per_stage: Sequence[int],
    *,
    guidance_scales: Sequence[float] | None = None,
) -> int:
    """One image of `pyramid`, or with one stage of `dit`: the velocity calls alone (None guides nothing)."""
    branches = [guidance_passes(scale) for scale in guidance_scales or (1.0,) * len(stage_tokens)]
    return sum(
        count * calls * velocity_macs(preset, tokens, token_channels)
        for tokens, calls, count in zip(stage_tokens, calls_per_stage, branches, strict=True)
    )


def pyramid_training_macs(preset: Preset, stage_tokens: Sequence[int], token_channels: int) -> int:
    """Forward and backward of one image: one velocity call a stage."""
    return (1 + BACKWARD_PER_FORWARD) * sum(velocity_macs(preset, tokens, token_channels) for tokens in stage_tokens)


def mar_trunk_macs(size: MaskedSize, tokens: int, token_channels: int, *, linears_only: bool = False) -> int:
    """One pass of the trunk of `mar` over all tokens, and each one's condition for the head."""
    ends = tokens * (token_channels + size.width) * size.width
    blocks = block_macs(tokens, size.width, size.depth, linears_only=linears_only)
    return blocks + adaln_macs(size.width, 1, "shared") + ends


def mar_head_macs(size: MaskedSize, token_channels: int) -> int:
    """One velocity of one token, without its time embedding: 2 D^2 and the adaLN's 3 D^2 a block, 2 D^2 at the end."""
    return (5 * size.head_depth + 2) * size.width**2 + 2 * token_channels * size.width


def mar_sampling_macs(
    size: MaskedSize,
    token_channels: int,
    counts: Sequence[int],
    calls: int,
    *,
    guidance_scales: Sequence[float] | None = None,
) -> int:
    """One image: a trunk pass a step, and `calls` velocities of each token in the step that draws it.

    counts: tokens that are masked before the first step and after each, from T to 0. The time is embedded once a call.
    """
    branches = [guidance_passes(scale) for scale in guidance_scales or (1.0,) * (len(counts) - 1)]
    trunk, head = mar_trunk_macs(size, counts[0], token_channels), mar_head_macs(size, token_channels)
    return sum(
        count * (trunk + calls * (before - after) * head) + calls * time_macs(size.width)
        for (before, after), count in zip(pairwise(counts), branches, strict=True)
    )


def mar_training_macs(size: MaskedSize, tokens: int, token_channels: int, draws: int) -> int:
    """Forward and backward of one image: one trunk pass, and `draws` velocities, each at its own time, of every token.

    The head's outputs at tokens that are not masked are thrown away, as in MAR: shapes that do not depend on the data.
    """
    each = mar_head_macs(size, token_channels) + time_macs(size.width)
    return (1 + BACKWARD_PER_FORWARD) * (mar_trunk_macs(size, tokens, token_channels) + draws * tokens * each)
