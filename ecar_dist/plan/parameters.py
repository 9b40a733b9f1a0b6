"""Parameter counts in closed form, equal to those of the built modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ecar_dist.models.presets import MaskedSize, Preset

SINUSOID_WIDTH = 256  # input width of the time embedding


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the AR transformer (mar: the trunk) and of the velocity network (mar: the head)."""

    ar: int
    flow: int

    @property
    def total(self) -> int:
        return self.ar + self.flow


def linear(inputs: int, outputs: int) -> int:
    """A matrix and its bias."""
    return inputs * outputs + outputs


def transformer_parameters(depth: int, width: int, adaln: str, head_width: int = 0) -> int:
    """Blocks, their adaLN and the head's adaLN. `head_width` is the width of a head where q and k are normalised."""
    block = linear(width, 3 * width) + linear(width, width) + 2 * head_width
    block += linear(width, 4 * width) + linear(4 * width, width)
    modulation = linear(width, 6 * width)
    adaln_total = depth * modulation if adaln == "per_block" else modulation + depth * 6 * width
    return depth * block + adaln_total + linear(width, 2 * width)


def time_embedding_parameters(width: int) -> int:
    return linear(SINUSOID_WIDTH, width) + linear(width, width)


def ecar_parameters(
    preset: Preset, stage_tokens: Sequence[int], token_channels: int, num_classes: int, *, feeds_state: bool = True
) -> ParameterCount:
    """ECAR with patches of `token_channels` = C p^2 numbers. Position tables are fixed and count nothing."""
    num_stages, tokens = len(stage_tokens), sum(stage_tokens)
    ar_width = preset.ar_width
    learned_starts = stage_tokens[0] if feeds_state else tokens
    ar = transformer_parameters(preset.ar_depth, ar_width, "shared", ar_width // preset.ar_heads)
    ar += (num_classes + 1 + num_stages + learned_starts + tokens) * ar_width
    ar += linear(token_channels, ar_width) if feeds_state and num_stages > 1 else 0
    flow = velocity_parameters(preset, num_stages, token_channels, num_classes) + linear(ar_width, preset.flow_width)
    return ParameterCount(ar, flow)


def velocity_parameters(preset: Preset, num_stages: int, token_channels: int, num_classes: int) -> int:
    """The velocity network without a condition: all there is of `pyramid`, and with one stage of `dit`."""
    width = preset.flow_width
    count = transformer_parameters(preset.flow_depth, width, preset.flow_adaln, width // preset.flow_heads)
    count += (num_classes + 1 + num_stages) * width + time_embedding_parameters(width)
    return count + linear(token_channels, width) + linear(width, token_channels)


def mar_parameters(size: MaskedSize, num_tokens: int, token_channels: int, num_classes: int) -> ParameterCount:
    """Trunk (its mask vector is the 1) and head of `mar`."""
    width = size.width
    trunk = transformer_parameters(size.depth, width, "shared", width // size.heads)
    trunk += linear(token_channels, width) + (1 + num_classes + 1 + 2 * num_tokens) * width
    block = 2 * linear(width, width) + linear(width, 3 * width)
    head = size.head_depth * block + linear(width, 2 * width) + time_embedding_parameters(width)
    head += linear(token_channels, width) + linear(width, width) + linear(width, token_channels)
    return ParameterCount(trunk, head)


def dit_parameters(depth: int, width: int, *, token_channels: int = 16, num_classes: int = 1000) -> int:
    """DiT (arXiv 2212.09748): no QK-norm, twice the channels out (learned variance); positions are fixed."""
    count = transformer_parameters(depth, width, "per_block") + time_embedding_parameters(width)
    count += (num_classes + 1) * width
    return count + linear(token_channels, width) + linear(width, 2 * token_channels)
