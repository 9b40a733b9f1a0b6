"""The loss by stage and flow time: where on its path a sample is hard."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LossByTime:
    """Sums and counts of the loss, by stage and by bin of the time within it. Adding to them never synchronises."""

    def __init__(self, num_stages: int, bins: int, device: torch.device) -> None:
        self._bins = bins
        self._first_bin = torch.arange(num_stages, device=device) * bins  # of each stage
        self._table = torch.zeros(2, num_stages * bins, dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, times: torch.Tensor) -> None:
        """Both [B, K], times in [0, 1]. A loss that is not finite, or that has no one time (NaN), is left out."""
        finite = losses.isfinite() & times.isfinite()
        index = (times.nan_to_num() * self._bins).long().clamp_(0, self._bins - 1) + self._first_bin  # [B, K]
        values = torch.stack([losses.where(finite, 0.0), finite]).to(self._table.dtype)  # [2, B, K]
        self._table.index_add_(1, index.flatten(), values.flatten(1))

    def take(self) -> torch.Tensor:
        """What came since the last call, flat: all sums, then all counts. To be added up over ranks."""
        table, self._table = self._table, torch.zeros_like(self._table)
        return table.flatten()

    def means(self, table: Sequence[float]) -> dict[str, float]:
        """By tag, from what `take` gave; a bin without a sample has no value."""
        cells = len(table) // 2
        return {
            f"train/loss_stage{cell // self._bins}_t{cell % self._bins}": table[cell] / table[cells + cell]
            for cell in range(cells)
            if table[cells + cell]
        }
