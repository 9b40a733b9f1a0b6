"""Down, up, and the noise that joins two resolutions (docs/ecar.md, 4.2-4.5). All tensors are [B, C, H, W]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ecar_dist.flow.schedule import StageSchedule


def downsample(x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """D: the factor x factor mean. For a factor of 4, pool by 2 twice: one bilinear call by 4 is not the mean."""
    return F.avg_pool2d(x, factor)


def upsample(x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """U: nearest neighbour, the only upsampling for which the jump's algebra holds. D(U(x)) = x."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def latent_pyramid(latents: torch.Tensor, num_stages: int, factor: int = 2) -> list[torch.Tensor]:
    """z_0 .. z_{K-1}, coarse to fine; the last is `latents` itself."""
    # Pool one stage at a time: the mean of means is the mean over the larger block.
    pyramid = [latents]
    for _ in range(num_stages - 1):
        pyramid.insert(0, downsample(pyramid[0], factor))
    return pyramid


def block_noise(white: torch.Tensor, gamma: float, factor: int = 2) -> torch.Tensor:
    """n' of eq. (15): unit variance, correlation `gamma` inside each factor x factor block, from N(0, I) noise.

    No Cholesky factorisation: at the extreme gamma the covariance is singular, and this form is exact there.
    """
    # Split white noise into its block means and the remainder: one for each eigenvalue of the block covariance.
    mean = upsample(downsample(white, factor), factor)
    common = max(0.0, 1.0 + (factor**2 - 1) * gamma)  # 0 at the extreme gamma; rounding may give -1e-17
    return math.sqrt(1.0 - gamma) * (white - mean) + math.sqrt(common) * mean


def noise_pyramid(white: list[torch.Tensor], schedule: StageSchedule) -> list[torch.Tensor]:
    """n_0 .. n_{K-1}, each N(0, I), from independent N(0, I) draws at every stage's size; eq. (14).

    Built coarse to fine, so that X^s_k, which uses n_k, and X^e_{k-1}, which uses n_{k-1}, have the joint law of
    sampling. At the extreme gamma, n_{k-1} = r D(n_k), eq. (12), and eq. (13) holds for every sample.
    """
    gamma, factor = schedule.gamma, schedule.factor
    noises = [white[0]]
    for draw in white[1:]:
        # Eq. (14): the upsampled noise of the coarser stage, scaled, plus the stage's own block noise.
        inherited = math.sqrt(-gamma / (1.0 - gamma)) * upsample(noises[-1], factor)
        noises.append(inherited + block_noise(draw, gamma, factor) / math.sqrt(1.0 - gamma))
    return noises


def stage_jump(x: torch.Tensor, white: torch.Tensor, stage: int, schedule: StageSchedule) -> torch.Tensor:
    """X^s_k = a U(X^e_{k-1}) + alpha n', eq. (6): from the end x of stage k - 1 to the start of stage k = `stage`.

    white: N(0, I) noise with the shape of stage k, from which n' is made.
    """
    # The jump keeps the blocks of x; n' removes the correlation that upsampling introduces within each block.
    scale, alpha = schedule.jump(stage)
    return scale * upsample(x, schedule.factor) + alpha * block_noise(white, schedule.gamma, schedule.factor)
