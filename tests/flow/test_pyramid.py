from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ecar_dist.flow.path import stage_endpoints
from ecar_dist.flow.pyramid import block_noise, downsample, latent_pyramid, noise_pyramid, stage_jump, upsample
from ecar_dist.flow.schedule import StageSchedule, uniform_ends

GAMMAS = [-1 / 3, -0.2, -0.05]


def white_pyramid(schedule: StageSchedule, batch: int, side: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Independent N(0, I) draws of every stage's size, coarse to fine."""
    generator = torch.Generator().manual_seed(0)
    sides = [side // schedule.factor**k for k in reversed(range(schedule.num_stages))]
    return [torch.randn(batch, 2, n, n, dtype=dtype, generator=generator) for n in sides]


def block_covariance(noise: torch.Tensor, factor: int) -> torch.Tensor:
    """Sample covariance of the pixels of one block, over all blocks of [B, C, H, W]; [n_b, n_b]."""
    blocks = F.unfold(noise.flatten(0, 1)[:, None], factor, stride=factor)  # [B C, n_b, blocks]
    rows = blocks.transpose(0, 1).flatten(1)  # [n_b, B C blocks]
    return rows @ rows.T / rows.shape[1]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_down_undoes_up(factor: int) -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = upsample(x, factor)
    assert up.shape == (2, 3, 5 * factor, 5 * factor)
    torch.testing.assert_close(downsample(up, factor), x, rtol=0, atol=1e-15)


def test_up_copies_each_pixel_over_its_block() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert upsample(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_latent_pyramid_is_means_of_blocks() -> None:
    latents = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coarse, middle, fine = latent_pyramid(latents, 3)
    assert fine is latents
    torch.testing.assert_close(middle, latents.view(2, 3, 4, 2, 4, 2).mean((3, 5)))
    torch.testing.assert_close(coarse, latents.view(2, 3, 2, 4, 2, 4).mean((3, 5)))


def test_one_bilinear_call_by_four_is_not_the_mean() -> None:
    """Why the pyramid pools by 2 twice: bilinear sees the centre 2 x 2 of a 4 x 4 block and keeps twice the std."""
    white = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    direct = F.interpolate(white, scale_factor=0.25, mode="bilinear")
    assert direct.std().item() == pytest.approx(0.5, abs=0.01)
    assert latent_pyramid(white, 3)[0].std().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_block_noise_covariance(gamma: float) -> None:
    """Over 131,072 blocks: 1 on the diagonal, gamma off it."""
    white = torch.randn(2, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    expected = torch.full((4, 4), gamma).fill_diagonal_(1.0)
    assert (block_covariance(block_noise(white, gamma), 2) - expected).abs().max() < 0.02


@pytest.mark.parametrize(("factor", "gamma"), [(2, -1 / 3), (2, -0.2), (3, -1 / 8), (3, -0.05), (4, -1 / 15)])
def test_block_noise_covariance_exactly(factor: int, gamma: float) -> None:
    side, pixels = 2 * factor, 4 * factor**2
    basis = torch.eye(pixels, dtype=torch.float64)
    matrix = block_noise(basis.view(-1, 1, side, side), gamma, factor).flatten(1)
    corner = F.unfold(torch.arange(pixels, dtype=torch.float64).view(1, 1, side, side), factor, stride=factor)
    same_block = torch.zeros(pixels, pixels, dtype=torch.float64)
    for block in corner[0].T.long():
        same_block[block[:, None], block] = 1.0
    expected = gamma * same_block + (1 - gamma) * basis
    torch.testing.assert_close(matrix.T @ matrix, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_noise_pyramid_has_unit_variance(gamma: float) -> None:
    schedule = StageSchedule(uniform_ends(3), gamma)
    for noise in noise_pyramid(white_pyramid(schedule, 16, 256, torch.float32), schedule)[1:]:
        covariance = block_covariance(noise, 2)
        assert (covariance - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("gamma", GAMMAS)
def test_noise_pyramid_is_white_exactly(gamma: float) -> None:
    schedule = StageSchedule(uniform_ends(3), gamma)
    white = torch.eye(1 + 4 + 16, dtype=torch.float64)
    draws = [part.reshape(-1, 1, n, n) for part, n in zip(white.split([1, 4, 16], dim=1), (1, 2, 4), strict=True)]
    for noise in noise_pyramid(draws, schedule):
        matrix = noise.flatten(1)
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("factor", [2, 3])
def test_coarse_noise_is_the_pooled_fine_noise(factor: int) -> None:
    """Eq. (12), at the extreme gamma."""
    schedule = StageSchedule(uniform_ends(3), gamma=-1 / (factor**2 - 1), factor=factor)
    noises = noise_pyramid(white_pyramid(schedule, 4, 4 * factor**2, torch.float64), schedule)
    for coarse, fine in itertools.pairwise(noises):
        torch.testing.assert_close(coarse, factor * downsample(fine, factor), rtol=0, atol=1e-12)


def endpoints_of(schedule: StageSchedule, white: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(white[-1].shape, dtype=white[-1].dtype, generator=generator)
    pyramid = latent_pyramid(latents, schedule.num_stages, schedule.factor)
    return stage_endpoints(schedule, pyramid, noise_pyramid(white, schedule))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_pathwise_identity(num_stages: int, dtype: torch.dtype, tolerance: float) -> None:
    """Eq. (13), for every sample: a start is the upsampled previous end plus block-centred noise."""
    schedule = StageSchedule(uniform_ends(num_stages))
    white = white_pyramid(schedule, 4, 16, dtype)
    noises, endpoints = noise_pyramid(white, schedule), endpoints_of(schedule, white)
    for k in range(1, num_stages):
        start, end = schedule.starts[k], schedule.ends[k - 1]
        centred = noises[k] - upsample(downsample(noises[k]))
        rebuilt = start / end * upsample(endpoints[k - 1][1]) + (1 - start) * centred
        assert (rebuilt - endpoints[k][0]).abs().max() < tolerance


@pytest.mark.parametrize(("factor", "gamma"), [*((2, gamma) for gamma in GAMMAS), (3, -1 / 8), (3, -0.05)])
def test_the_jump_leads_to_the_start_that_was_trained(factor: int, gamma: float) -> None:
    """At any gamma, the sampler's jump from X^e_{k-1} with stage k's white draw gives training's X^s_k."""
    schedule = StageSchedule(uniform_ends(3), gamma, factor)
    white = white_pyramid(schedule, 4, 4 * factor**2, torch.float64)
    endpoints = endpoints_of(schedule, white)
    for k in (1, 2):
        jumped = stage_jump(endpoints[k - 1][1], white[k], k, schedule)
        assert (jumped - endpoints[k][0]).abs().max() < 1e-12


def test_jump_noise_at_the_extreme_gamma_is_block_centred() -> None:
    """There block_noise is sqrt(4/3) (z - m): the block means of the start are a function of the previous end."""
    white = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = block_noise(white, -1 / 3)
    torch.testing.assert_close(noise, math.sqrt(4 / 3) * (white - upsample(downsample(white))))
    assert downsample(noise).abs().max() < 1e-12
