"""Model sizes, one row each. To add one, add a row to PRESETS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ecar_dist.config.run import RunConfig

AdaLNKind = Literal["per_block", "shared"]


@dataclass(frozen=True)
class Preset:
    """Depth, width and heads of the AR transformer and of the velocity network.

    flow_adaln: `per_block` gives each velocity block its own adaLN matrix (DiT). `shared` gives all blocks one matrix
    and each block a learned offset, because otherwise a third of the weights of the largest models would be adaLN.
    base_width: width of the base model under muP; None without muP.
    """

    ar_depth: int
    ar_width: int
    ar_heads: int
    flow_depth: int
    flow_width: int
    flow_heads: int
    flow_adaln: AdaLNKind = "per_block"
    base_width: int | None = None

    def width_ratio(self, width: int) -> float:
        """Ratio of this width to that of the base model of muP; 1 without muP."""
        return 1.0 if self.base_width is None else width / self.base_width


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


def preset_of(config: RunConfig) -> Preset:
    """The row of `model.preset`; `model.width`, `model.ar_depth` and `model.flow_depth` override it.

    Raises ValueError if `model.width` is not a multiple of the width of a head.
    """
    row = sized_row(config)
    return replace(
        row,
        ar_depth=config.model.ar_depth or row.ar_depth,
        flow_depth=config.model.flow_depth or row.flow_depth,
        base_width=config.optim.mup_base_width if config.optim.mup else None,
    )


def sized_row(config: RunConfig) -> Preset:
    """The row of `model.preset` at the width of `model.width`, with heads as wide as those of the row."""
    row, width = PRESETS[config.model.preset], config.model.width
    if width is None:
        return row
    ar_head, flow_head = row.ar_width // row.ar_heads, row.flow_width // row.flow_heads
    if width % ar_head or width % flow_head:
        head = max(ar_head, flow_head)
        raise ValueError(
            f"model.width={width} is not a multiple of {head}, the width of a head of model.preset="
            f"{config.model.preset}; set model.width={max(1, round(width / head)) * head}"
        )
    return replace(row, ar_width=width, ar_heads=width // ar_head, flow_width=width, flow_heads=width // flow_head)
