"""Bytes that the forward pass keeps for the backward pass, in closed form: the terms that several kinds share.

Counted per image, as autograd saves them on a GPU with fused attention and fused RMS norm. Each tensor counts once,
and parameters do not count. On a CPU the RMS norm is not fused, and keeps 8 more bytes per token and width. Residuals,
layer norms and the loss are fp32. Inputs and outputs of matrix products have the precision of the run. In bf16 the
weights are bf16 too, so autocast keeps no copies of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ecar_dist.kinds.parameters import SINUSOID_WIDTH
from ecar_dist.kinds.presets import AdaLNKind, Preset

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig

FP32 = 4
NORM_ROW = 2 * FP32  # mean and 1 / std of a token


@dataclass(frozen=True)
class Activations:
    """Bytes per image, and two counts of the calls that keep them.

    blocks: all transformer blocks.
    block_inputs: what remains of them when blocks are recomputed.
    largest_block: the block that keeps the most; a recomputed block's activations exist during its backward pass.
    rest: embeddings, projections, heads and loss.
    block_calls: how often the model calls a transformer block.
    block_segments: the same, but each call counts once for every segment with its own conditioning.
    """

    blocks: int = 0
    block_inputs: int = 0
    largest_block: int = 0
    rest: int = 0
    block_calls: int = 0
    block_segments: int = 0

    def __add__(self, other: Activations) -> Activations:
        return Activations(
            self.blocks + other.blocks,
            self.block_inputs + other.block_inputs,
            max(self.largest_block, other.largest_block),
            self.rest + other.rest,
            self.block_calls + other.block_calls,
            self.block_segments + other.block_segments,
        )


def number_bytes(precision: str) -> int:
    """Bytes of an operand of a matrix product; `precision` is `bf16` or `fp32`."""
    return 2 if precision == "bf16" else 4


def block_bytes(
    tokens: int, width: int, heads: int, adaln: AdaLNKind, precision: str, *, joined: bool, segments: int = 1
) -> int:
    """One block of models/transformer.py.

    joined: whether attention concatenates one call per stage. segments: how many have their own conditioning.
    """
    number = number_bytes(precision)

    # Modulated norms: the residual, the normalised residual, and the operand made from it.
    norms = 2 * (2 * FP32 + number)
    # Attention: qkv, normalised q and k, the heads' output, the projection. In bf16 the q and k norms keep fp32.
    attention = (3 + 2 + 1 + 1) * number + (2 * FP32 if number < FP32 else 0)
    join = number if joined else 0
    # MLP: before and after the GELU, and the output.
    mlp = (4 + 4 + 1) * number

    # Per token: the statistics of the two norms; per head those of the q and k norms and of the softmax.
    rows = 2 * NORM_ROW + 3 * heads * FP32
    # Per segment: the six modulation vectors, 1 + scale of both norms; the operand of the block's own adaLN matrix.
    modulation = (6 + 2 + (1 if adaln == "per_block" else 0)) * number
    return tokens * ((norms + attention + join + mlp) * width + rows) + segments * modulation * width


def transformer_activations(
    tokens: int,
    width: int,
    depth: int,
    heads: int,
    adaln: AdaLNKind,
    precision: str,
    *,
    joined: bool = False,
    segments: int = 1,
) -> Activations:
    """The blocks, the modulated norm at the end and its adaLN. The caller counts the conditioning itself."""
    number = number_bytes(precision)
    block = block_bytes(tokens, width, heads, adaln, precision, joined=joined, segments=segments)

    # Recomputation keeps the residual before each block, and the shared modulation.
    inputs = depth * tokens * width * FP32 + (segments * 6 * width * number if adaln == "shared" else 0)
    # The head's norm and adaLN, and the operand of the shared adaLN matrix.
    vectors = 2 + (1 if adaln == "shared" else 0)
    head = tokens * (2 * FP32 * width + NORM_ROW) + segments * vectors * width * number
    return Activations(depth * block, inputs, block, head, block_calls=depth, block_segments=depth * segments)


def time_embedding_bytes(width: int, precision: str) -> int:
    """The sinusoid and the two operands after it."""
    return (SINUSOID_WIDTH + 2 * width) * number_bytes(precision)


def velocity_activations(config: RunConfig, preset: Preset, precision: str) -> Activations:
    """The velocity network in one pass over all stages, without a condition, and the loss."""
    number = number_bytes(precision)
    width = preset.flow_width
    stages = config.flow.num_stages
    tokens = sum(config.stage_tokens)
    blocks = transformer_activations(
        tokens,
        width,
        preset.flow_depth,
        preset.flow_heads,
        preset.flow_adaln,
        precision,
        joined=stages > 1,
        segments=stages,
    )

    # Operands of the projections in and out, and the errors; for each stage its conditioning vector.
    ends = tokens * (config.token_channels * (number + FP32) + width * number)
    times = 2 if config.flow.learns_mean_velocity else 1
    vectors = stages * (width * number + times * time_embedding_bytes(width, precision))
    return blocks + Activations(rest=ends + vectors)
