"""Variance by spatial frequency: detects samples that lose their low frequencies (docs/ecar.md, section 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def band_variances(images: torch.Tensor) -> dict[str, float]:
    """Variance over the set of each octave of images [N, C, H, W], by block side.

    `8px` is the mean over 8x8 blocks minus the mean over 16x16 blocks, and so on. The coarsest band is the mean over
    the largest blocks (the whole image for a power of two). The bands add up to the total variance.
    """
    bands: dict[str, float] = {}
    current = images.double()
    side = 1
    while current.shape[-1] > 1 and current.shape[-1] % 2 == 0:
        # What the next octave cannot hold belongs to this one.
        coarser = F.avg_pool2d(current, 2)
        detail = current - F.interpolate(coarser, scale_factor=2, mode="nearest")
        bands[f"{side}px"] = _variance(detail)
        current = coarser
        side = side * 2
    bands[f"{side}px"] = _variance(current)
    return bands


def _variance(field: torch.Tensor) -> float:
    """Variance over samples, averaged over positions and channels."""
    return float(field.var(dim=0).mean())
