from __future__ import annotations

import pytest
import torch

from ecar_dist.flow.path import (
    TrainingPoints,
    interpolate,
    logit_normal_times,
    model_time,
    stage_endpoints,
    training_points,
)
from ecar_dist.flow.pyramid import latent_pyramid, noise_pyramid, upsample
from ecar_dist.flow.schedule import StageSchedule, uniform_ends

SIDES = (2, 4, 8)
TAU = 0.3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws_of_stages(batch: int, sides: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    return [randn(batch, 2, side, side, seed=seed + k) for k, side in enumerate(sides)]


def points_at(schedule: StageSchedule, u: torch.Tensor, tau: float = TAU, context_seed: int = 200) -> TrainingPoints:
    """Training points of a fixed batch at times u [B]."""
    batch = len(u)
    contexts = draws_of_stages(batch, SIDES[:-1], context_seed)
    return training_points(
        schedule, randn(batch, 2, 8, 8), draws_of_stages(batch, SIDES, 100), [u] * len(SIDES), contexts, tau
    )


def endpoints_at(schedule: StageSchedule, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    noises = noise_pyramid(draws_of_stages(batch, SIDES, 100), schedule)
    return stage_endpoints(schedule, latent_pyramid(randn(batch, 2, 8, 8), 3), noises)


def test_endpoints_mix_latents_and_noise_by_the_windows() -> None:
    """Eq. (1)-(3) with the windows [0, 1/3] [1/5, 2/3] [1/2, 1]; both ends of a stage share one noise field."""
    schedule = StageSchedule(uniform_ends(3))
    z, n = draws_of_stages(2, SIDES, 0), draws_of_stages(2, SIDES, 10)
    endpoints = stage_endpoints(schedule, z, n)
    expected = [
        (n[0], z[0] / 3 + n[0] * 2 / 3),
        (upsample(z[0]) / 5 + n[1] * 4 / 5, z[1] * 2 / 3 + n[1] / 3),
        (upsample(z[1]) / 2 + n[2] / 2, z[2]),
    ]
    for got, wanted in zip(endpoints, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_interpolation_gives_each_sample_its_own_time() -> None:
    start, end = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    x = interpolate(start, end, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.equal(x[0], start[0])
    torch.testing.assert_close(x[1], 0.75 * start[1] + 0.25 * end[1])
    assert torch.equal(x[2], end[2])


def test_states_run_from_start_to_end_along_the_target() -> None:
    schedule = StageSchedule(uniform_ends(3))
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    points = points_at(schedule, u)
    for k, (start, end) in enumerate(endpoints_at(schedule, 3)):
        assert points.states[k].shape == (3, 2, SIDES[k], SIDES[k])
        torch.testing.assert_close(points.targets[k], end - start)
        torch.testing.assert_close(points.states[k], start + u.view(3, 1, 1, 1) * points.targets[k])


def test_contexts_are_ends_plus_their_own_noise() -> None:
    schedule = StageSchedule(uniform_ends(3))
    points, xi = points_at(schedule, torch.rand(4)), draws_of_stages(4, SIDES[:-1], 200)
    ends = [end for _, end in endpoints_at(schedule, 4)]
    assert len(points.contexts) == 2
    for k in range(2):
        torch.testing.assert_close(points.contexts[k], ends[k] + TAU * xi[k])


def test_context_noise_touches_nothing_else() -> None:
    u = torch.full((4,), 0.4)
    one, other = (points_at(StageSchedule(uniform_ends(3)), u, context_seed=seed) for seed in (200, 300))
    for left, right in zip(one.states + one.targets, other.states + other.targets, strict=True):
        assert torch.equal(left, right)
    assert not any(torch.equal(left, right) for left, right in zip(one.contexts, other.contexts, strict=True))


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_context_scales_give_unit_variance(tau: float) -> None:
    """On latents constant over the image, which have unit variance at every stage."""
    schedule, batch = StageSchedule(uniform_ends(3)), 20_000
    latents = randn(batch, 1, 1, 1).expand(batch, 2, 8, 8)
    times = [torch.zeros(batch)] * 3
    points = training_points(
        schedule, latents, draws_of_stages(batch, SIDES, 100), times, draws_of_stages(batch, SIDES[:-1], 200), tau
    )
    for context, scale in zip(points.contexts, schedule.context_scales(tau), strict=True):
        assert (scale * context).var().item() == pytest.approx(1.0, abs=0.02)


def test_model_time_fills_the_window_of_its_stage() -> None:
    schedule = StageSchedule(uniform_ends(3))
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    for stage, (low, high) in enumerate(schedule.model_windows):
        time = model_time(schedule, stage, u)
        assert time.dtype == torch.float32
        torch.testing.assert_close(time, torch.tensor([low, (low + high) / 2, high], dtype=torch.float32))
        torch.testing.assert_close(points_at(schedule, u).times[stage], time)


def test_logit_normal_times_are_sigmoids_of_normal_numbers() -> None:
    below = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([-2.0, 0.0, 1.0]))  # U(0, 1) numbers
    torch.testing.assert_close(logit_normal_times(below), torch.sigmoid(torch.tensor([-2.0, 0.0, 1.0])))
    ends = logit_normal_times(torch.tensor([2.0**-24, 1.0 - 2.0**-24]))  # the smallest and the largest draw
    assert 0.0 < float(ends[0]) < float(ends[1]) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_stage_is_plain_flow_matching_bit_for_bit(dtype: torch.dtype) -> None:
    z, n = randn(4, 2, 8, 8).to(dtype), randn(4, 2, 8, 8, seed=1).to(dtype)
    u = torch.rand(4, generator=torch.Generator().manual_seed(2))
    points = training_points(StageSchedule((1.0,)), z, [n], [u], [], TAU)
    weight = u.view(4, 1, 1, 1)
    assert points.contexts == []
    assert torch.equal(points.states[0], (1 - weight) * n + weight * z)
    assert torch.equal(points.targets[0], z - n)
    assert torch.equal(points.times[0], u)
