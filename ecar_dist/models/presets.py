"""Sizes of ECAR, one row each. No torch: `ecar-dist plan` reads them on a login node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ecar_dist.config.run import RunConfig

AdaLNKind = Literal["per_block", "shared"]


@dataclass(frozen=True)
class Preset:
    """Depth, width and heads of the AR transformer and of the velocity network.

    flow_adaln: `per_block` gives every velocity block its own adaLN matrix (DiT); `shared` gives all of them one matrix
    and each a learned offset, which is what keeps the largest rows from spending a third of their weights there.
    """

    ar_depth: int
    ar_width: int
    ar_heads: int
    flow_depth: int
    flow_width: int
    flow_heads: int
    flow_adaln: AdaLNKind = "per_block"


PRESETS: dict[str, Preset] = {
    "T": Preset(4, 128, 4, 3, 128, 4),
    "S": Preset(12, 384, 6, 12, 384, 6),
    "B": Preset(12, 768, 12, 12, 768, 12),
    "L": Preset(16, 1024, 16, 20, 1024, 16),
    "XL": Preset(14, 1152, 16, 28, 1152, 16),  # velocity network = the trunk of DiT-XL
    "XXL": Preset(24, 1536, 24, 28, 1536, 24),
    "3B": Preset(24, 2048, 16, 36, 2048, 16, "shared"),
    "7B": Preset(28, 3072, 24, 34, 3072, 24, "shared"),
}


@dataclass(frozen=True)
class MaskedSize:
    """Depth, width and heads of the trunk of `mar`, and the blocks of its head, which is as wide."""

    depth: int
    width: int
    heads: int
    head_depth: int


def preset_of(config: RunConfig) -> Preset:
    """The row of `model.preset`, with the depths that the config sets itself."""
    row, model = PRESETS[config.model.preset], config.model
    return replace(row, ar_depth=model.ar_depth or row.ar_depth, flow_depth=model.flow_depth or row.flow_depth)


def masked_size_of(config: RunConfig) -> MaskedSize:
    """`mar` has the depth of both networks of the preset in one trunk, and a quarter of that, 3 at least, in its head.

    At B that is MAR-B as its authors evaluate it, 24 x 768 with a head of 6 blocks (README of LTH14/mar); MAR-L has
    32 x 1024 and 8, MAR-H 40 x 1280 and 12. Their heads are 1024, 1280 and 1536 wide.
    """
    row, model = PRESETS[config.model.preset], config.model
    depth = row.ar_depth + row.flow_depth
    head_depth = model.flow_depth or max(3, depth // 4)
    return MaskedSize(model.ar_depth or depth, row.flow_width, row.flow_heads, head_depth)
