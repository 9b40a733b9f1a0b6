"""What `mar`, `par`, `par_cont` and `hybrid` share: the size of their trunk, and the cost of their flow head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ecar_dist.kinds.activations import FP32, NORM_ROW, number_bytes, time_embedding_bytes
from ecar_dist.kinds.parameters import block_weights, linear, time_embedding_parameters
from ecar_dist.kinds.presets import sized_row

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig


@dataclass(frozen=True)
class TrunkSize:
    """Depth, width and heads of the trunk, and the number of blocks of the head, which has the same width."""

    depth: int
    width: int
    heads: int
    head_depth: int


def trunk_size_of(config: RunConfig) -> TrunkSize:
    """The trunk is as deep as both networks of the preset together; the head has a quarter of that, at least 3 blocks.

    At B this is MAR-B as its authors evaluate it, 24 x 768 with a head of 6 blocks (README of LTH14/mar); MAR-L has
    32 x 1024 and 8, MAR-H 40 x 1280 and 12. Their heads are 1024, 1280 and 1536 wide.
    """
    row = sized_row(config)
    model = config.model
    depth = row.ar_depth + row.flow_depth
    head_depth = model.flow_depth or max(3, depth // 4)
    return TrunkSize(model.ar_depth or depth, row.flow_width, row.flow_heads, head_depth)


def token_network_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments that all networks over tokens take after the size of their trunk."""
    return {
        "latent_size": config.data.latent_size,
        "latent_channels": config.data.latent_channels,
        "patch_size": config.model.patch_size,
        "num_classes": config.data.num_classes,
        "recompute": config.train.activation_checkpointing,
    }


def quantized_weights(size: TrunkSize) -> int:
    """Weights of the trunk's blocks, of the two matrices of each head block, and of the head's condition projection."""
    return block_weights(size.width, size.depth) + (2 * size.head_depth + 1) * size.width**2


def head_parameters(size: TrunkSize, token_channels: int) -> int:
    """Residual blocks with adaLN, time embedding, projections of the state, the condition and the velocity."""
    width = size.width
    block = 2 * linear(width, width) + linear(width, 3 * width)
    head = size.head_depth * block + linear(width, 2 * width) + time_embedding_parameters(width)
    return head + linear(token_channels, width) + linear(width, width) + linear(width, token_channels)


def head_macs(size: TrunkSize, token_channels: int) -> int:
    """One velocity of one token, without its time embedding: 2 D^2 and adaLN's 3 D^2 per block, 2 D^2 at the end."""
    return (5 * size.head_depth + 2) * size.width**2 + 2 * token_channels * size.width


def head_bytes(size: TrunkSize, token_channels: int, precision: str) -> int:
    """Bytes that one draw of one token keeps for the backward pass."""
    number = number_bytes(precision)
    width = size.width

    # Projections, the conditioning and its time, the last norm with its adaLN, and the errors.
    draw = number * (token_channels + width) + FP32 * token_channels
    draw += time_embedding_bytes(width, precision) + width * number
    draw += 2 * FP32 * width + NORM_ROW + 2 * width * number

    # A block: its norm, the operands of its two layers and of its adaLN, its output, gate and 1 + scale.
    block = 2 * FP32 * width + NORM_ROW + (4 + 1 + 3 + 1) * width * number
    return draw + size.head_depth * block
