"""Parameter counts in closed form: the terms that several kinds share. They equal the counts of the built modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ecar_dist.kinds.presets import Preset

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig

SINUSOID_WIDTH = 256  # input width of the time embedding


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the AR transformer (mar: the trunk) and of the velocity network (mar: the head).

    block: parameters of the largest transformer block, which is part of one of them.
    quantized: weights of the layers that `ecar-dist quantize` rounds (quantize/layers.py); 0 if not counted.
    """

    ar: int
    flow: int
    block: int = 0
    quantized: int = 0

    @property
    def total(self) -> int:
        return self.ar + self.flow


def linear(inputs: int, outputs: int) -> int:
    """A matrix and its bias."""
    return inputs * outputs + outputs


def block_parameters(width: int, adaln: str, head_width: int = 0) -> int:
    """One transformer block. `head_width` is the width of an attention head if q and k are normalised."""
    # qkv, output projection, the gains of the q and k norms, and the MLP
    block = linear(width, 3 * width) + linear(width, width) + 2 * head_width
    block += linear(width, 4 * width) + linear(4 * width, width)

    # modulation: a matrix of its own, or an offset to the shared one
    return block + (linear(width, 6 * width) if adaln == "per_block" else 6 * width)


def block_weights(width: int, depth: int) -> int:
    """The four matrices of each of `depth` blocks, which are quantised: 3 + 1 + 4 + 4 times D^2."""
    return 12 * width**2 * depth


def transformer_parameters(depth: int, width: int, adaln: str, head_width: int = 0) -> int:
    """Blocks, the shared adaLN if there is one, and the head's adaLN."""
    shared = linear(width, 6 * width) if adaln == "shared" else 0
    return depth * block_parameters(width, adaln, head_width) + shared + linear(width, 2 * width)


def time_embedding_parameters(width: int) -> int:
    return linear(SINUSOID_WIDTH, width) + linear(width, width)


def velocity_parameters(config: RunConfig, preset: Preset) -> int:
    """The velocity network (models/velocity.py) without a condition.

    Position tables are fixed and not counted.
    """
    width = preset.flow_width
    count = transformer_parameters(preset.flow_depth, width, preset.flow_adaln, width // preset.flow_heads)

    # Rows for classes and stages; the time, and the length of an interval if there is one.
    times = 2 if config.flow.learns_mean_velocity else 1
    count += (config.data.num_classes + 1 + config.flow.num_stages) * width + times * time_embedding_parameters(width)
    return count + linear(config.token_channels, width) + linear(width, config.token_channels)
