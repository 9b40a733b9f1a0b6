"""Bytes of activations per image, from the closed form of each kind (kinds/activations.py)."""

from __future__ import annotations

from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.table import kind_of

# A compiled block keeps 43 bytes per token and width where the eager one keeps 63, measured on one block in bf16 with
# the min-cut partition of torch.compile. Both figures come from one measurement, so their ratio is used.
COMPILED_SHARE = 43 / 63

# Gradients inside the block whose backward pass runs: of the residual, and of the MLP's output and both hidden layers.
# That is 22 bytes per token and width in bf16, of the 60 that the block keeps, and 40 of 88 in fp32.
GRADIENT_SHARE = 0.4


def activation_bytes(config: RunConfig, precision: str, *, compiled: bool, recompute: bool) -> int:
    """The peak for one image: what is kept for the backward pass, and the gradients inside one block.

    `compiled`: each transformer block is compiled. `recompute`: the inputs of all blocks are kept, and the rest of one
    block at a time.
    """
    counted = kind_of(config).activations(config, precision)
    share = COMPILED_SHARE if compiled else 1.0
    outside = counted.rest + round(GRADIENT_SHARE * counted.largest_block)
    if recompute:
        return counted.block_inputs + round(share * counted.largest_block) + outside
    return round(share * counted.blocks) + outside
