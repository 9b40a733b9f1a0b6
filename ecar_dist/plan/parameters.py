"""Parameter counts in closed form, equal to those of the built modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ecar_dist.models.presets import Preset

SINUSOID_WIDTH = 256  # input width of the time embedding


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the AR transformer and of the velocity network."""

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
    ar_width, flow_width = preset.ar_width, preset.flow_width
    learned_starts = stage_tokens[0] if feeds_state else tokens
    ar = transformer_parameters(preset.ar_depth, ar_width, "shared", ar_width // preset.ar_heads)
    ar += (num_classes + 1 + num_stages + learned_starts + tokens) * ar_width
    ar += linear(token_channels, ar_width) if feeds_state and num_stages > 1 else 0
    flow = transformer_parameters(preset.flow_depth, flow_width, preset.flow_adaln, flow_width // preset.flow_heads)
    flow += (num_classes + 1 + num_stages) * flow_width + time_embedding_parameters(flow_width)
    flow += linear(token_channels, flow_width) + linear(ar_width, flow_width) + linear(flow_width, token_channels)
    return ParameterCount(ar, flow)


def dit_parameters(depth: int, width: int, *, token_channels: int = 16, num_classes: int = 1000) -> int:
    """DiT (arXiv 2212.09748): no QK-norm, twice the channels out (learned variance); positions are fixed."""
    count = transformer_parameters(depth, width, "per_block") + time_embedding_parameters(width)
    count += (num_classes + 1) * width
    return count + linear(token_channels, width) + linear(width, 2 * token_channels)
