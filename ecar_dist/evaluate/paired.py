"""How far apart two sets of images from the same noise are: PSNR and SSIM of each pair, averaged."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of uint8 [B, H, W, 3], from the mean squared error of all images together.

    Infinite if nothing differs.
    """
    error = float(np.square(ours.astype(np.float64) - theirs.astype(np.float64)).mean())
    return 10.0 * math.log10(PEAK**2 / error) if error > 0.0 else math.inf


def ssim(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Structural similarity of uint8 [B, H, W, 3], mean over pixels, channels and images; 1 if nothing differs.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): a Gaussian window of
    11 x 11 pixels with std 1.5, where it fits; smaller images have a smaller window.
    """
    a, b = (torch.from_numpy(images).permute(0, 3, 1, 2).double() for images in (ours, theirs))  # [B, 3, H, W]

    # The window, on each channel by itself.
    width = min(WINDOW, a.shape[-1], a.shape[-2])
    places = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    line = torch.exp(-(places**2) / (2 * SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(a.shape[1], 1, width, width)

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window, groups=a.shape[1])

    # Local moments, and the formula.
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return float((luminance * structure).mean())
