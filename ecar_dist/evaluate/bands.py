"""Variance by spatial frequency: detects samples that lose their low frequencies (docs/ecar.md, section 5)."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from ecar_dist.vae.pixels import from_pixels

TILE = 16  # pixels; a tile of 50,000 images is 0.3 GB in float64


def band_variances(pixels: np.ndarray | torch.Tensor, device: torch.device) -> dict[str, float]:
    """Variance over the set of each octave of images [N, H, W, 3] with values in 0 .. 255, by block side.

    `8px` is the mean over 8x8 blocks minus the mean over 16x16 blocks, and so on. The coarsest band is the mean over
    the largest blocks (the whole image for a power of two). The bands add up to the total variance.

    Computed on `device` in float64, tile by tile over all images, because the set may be larger than memory.
    """
    images = torch.as_tensor(pixels)
    count, height, width, channels = images.shape
    tile = math.gcd(TILE, height, width)

    # The octaves within a tile: their variances at each position, and the means of the tiles.
    variances: list[torch.Tensor] = []
    means = torch.empty(count, channels, height // tile, width // tile, dtype=torch.float64, device=device)
    for top, left in product(range(0, height, tile), range(0, width, tile)):
        *details, mean = _octaves(from_pixels(images[:, top : top + tile, left : left + tile].to(device)).double())
        means[:, :, top // tile, left // tile] = mean[:, :, 0, 0]
        variances = variances or [
            torch.empty(channels, height >> octave, width >> octave, dtype=torch.float64, device=device)
            for octave in range(len(details))
        ]
        for octave, detail in enumerate(details):
            rows, columns = (slice(start >> octave, (start + tile) >> octave) for start in (top, left))
            variances[octave][:, rows, columns] = detail.var(dim=0)

    # The coarser octaves, from the means. Each is averaged over positions and channels.
    variances += [field.var(dim=0) for field in _octaves(means)]
    return {f"{2**octave}px": float(variance.mean()) for octave, variance in enumerate(variances)}


def _octaves(field: torch.Tensor) -> list[torch.Tensor]:
    """What each octave of [N, C, H, W] adds to the next coarser one, and finally the coarsest."""
    octaves = []
    while field.shape[-1] > 1 and field.shape[-1] % 2 == 0:
        # What the next octave cannot represent belongs to this one.
        coarser = F.avg_pool2d(field, 2)
        octaves.append(field - F.interpolate(coarser, scale_factor=2, mode="nearest"))
        field = coarser
    return [*octaves, field]
