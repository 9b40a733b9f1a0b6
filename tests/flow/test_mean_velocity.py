"""Average velocities with known truth: for one Gaussian number in closed form, for Gaussian fields by integration."""

from __future__ import annotations

import pytest
import torch

from ecar_dist.flow.mean_velocity import TO_THE_END, Interval, MeanVelocityFn, Tensors, splitting_targets
from ecar_dist.flow.multistage import BeginStage
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from tests.flow.oracle import (
    GaussianOracle,
    begin_stages,
    exponential_covariance,
    relative_error,
    sampled_covariance,
)

SIGMA = 3.0  # of the data in the closed form
TRUTH = exponential_covariance(4)


def spread(u: torch.Tensor) -> torch.Tensor:
    """Standard deviation of x_u = (1 - u) noise + u data."""
    return ((1.0 - u).square() + (SIGMA * u).square()).sqrt()


def true_velocity(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """E[data - noise | x_u] = x s'(u) / s(u)."""
    return x * ((SIGMA**2 * u - (1.0 - u)) / spread(u).square())[:, None, None, None]


def true_mean_velocity(states, starts, lengths):
    """The flow carries x_a to x_a s(b) / s(a), in every stage."""
    found = []
    for x, a, h in zip(states, starts, lengths, strict=True):
        growth = (spread(a + h) / spread(a) - 1.0) / h.clamp(min=1e-12)
        found.append(x * growth[:, None, None, None])
    return found


def cases(count: int = 64) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Interval]]:
    """Two stages of states, the velocities of the flow there, and intervals of positive length."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(count, 1, side, side, dtype=torch.float64, generator=generator) for side in (1, 2)]
    intervals = []
    for _ in states:
        start, split = torch.rand(2, count, dtype=torch.float64, generator=generator)
        length = (1.0 - start) * torch.rand(count, dtype=torch.float64, generator=generator)
        intervals.append(Interval(start, length, split))
    velocities = [true_velocity(x, each.start) for x, each in zip(states, intervals, strict=True)]
    return states, velocities, intervals


def differential_targets(
    mean_velocity: MeanVelocityFn, states: Tensors, velocities: Tensors, intervals: list[Interval]
) -> list[torch.Tensor]:
    """`splitting_targets` from the differential identity of MeanFlow (arXiv 2505.13447, eq. 6).

    With the end b = a + h held fixed, U(x_a, a, h) = v + h dU/da, where dU/da is the derivative along the path:
    (v, 1, -1) in (x, a, h). It needs forward-mode derivatives, which fused attention does not support.
    """
    starts = [each.start for each in intervals]
    lengths = [each.length for each in intervals]
    ones = [torch.ones_like(each.start) for each in intervals]
    with torch.no_grad():
        tangents = (list(velocities), ones, [-one for one in ones])
        slopes = torch.func.jvp(mean_velocity, (list(states), starts, lengths), tangents)[1]
        return [v + h[:, None, None, None] * slope for v, h, slope in zip(velocities, lengths, slopes, strict=True)]


@pytest.mark.parametrize("make_targets", [splitting_targets, differential_targets])
def test_the_true_average_velocity_is_a_fixed_point(make_targets) -> None:
    states, velocities, intervals = cases()
    truth = true_mean_velocity(states, [each.start for each in intervals], [each.length for each in intervals])
    for target, expected in zip(make_targets(true_mean_velocity, states, velocities, intervals), truth, strict=True):
        torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)


def test_the_velocity_in_place_of_the_average_is_not_one() -> None:
    states, velocities, intervals = cases()

    def instant(states, starts, lengths):
        return [true_velocity(x, a) for x, a in zip(states, starts, strict=True)]

    targets = splitting_targets(instant, states, velocities, intervals)
    assert max(float((a - b).abs().max()) for a, b in zip(targets, velocities, strict=True)) > 0.1


def test_an_interval_of_no_length_learns_the_velocity_of_the_path() -> None:
    states, velocities, intervals = cases()
    lengths = torch.where(torch.arange(64) % 2 == 0, 0.0, intervals[0].length)
    mixed = [Interval(each.start, lengths, each.split) for each in intervals]
    targets = splitting_targets(true_mean_velocity, states, velocities, mixed)
    for target, velocity in zip(targets, velocities, strict=True):
        assert torch.equal(target[::2], velocity[::2])
        assert not torch.isclose(target[1::2], velocity[1::2]).any()


def test_no_gradient_flows_through_a_target() -> None:
    states, velocities, intervals = cases()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def scaled(*arguments):
        return [scale * each for each in true_mean_velocity(*arguments)]

    assert not any(target.requires_grad for target in splitting_targets(scaled, states, velocities, intervals))


def test_intervals_lie_inside_the_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(20_000, generator=generator)
    drawn = Interval.draw(u, torch.rand(20_000, 4, generator=generator), instant_share=0.3, whole_share=0.2)
    ends = drawn.start + drawn.length
    assert float(drawn.start.min()) >= 0.0
    assert float(ends.max()) <= 1.0 + 1e-6
    instant = drawn.length == 0.0
    assert float(instant.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(drawn.start[instant], u[instant])  # an instant is at the time that `FlowObjective` uses
    to_the_end = (ends > 1.0 - 1e-6) & ~instant
    assert float(to_the_end[~instant].float().mean()) == pytest.approx(TO_THE_END + 0.2, abs=0.01)
    whole = (drawn.start == 0.0) & (drawn.length == 1.0)
    assert float(whole[~instant].float().mean()) == pytest.approx(0.2, abs=0.01)
    between = ~instant & ~to_the_end
    assert float(drawn.length[between].mean()) == pytest.approx(1 / 3, abs=0.01)  # mean distance of two uniform times


def averaged(oracle: GaussianOracle, steps: int) -> BeginStage:
    """Stages of average velocities, each by integrating the oracle's velocity in `steps` steps."""
    begin_instant = begin_stages(oracle, "all")

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        velocity = begin_instant(stage, context)

        def mean_velocity(x: torch.Tensor, u: float, length: float = 0.0, /) -> torch.Tensor:
            inside = SOLVERS["midpoint"](lambda y, w: length * velocity(y, u + w * length), x, steps)
            return (inside - x) / length

        return mean_velocity

    return begin_stage


def gaussian(tau: float, num_stages: int = 3) -> GaussianOracle:
    schedule = StageSchedule(uniform_ends(num_stages))
    return GaussianOracle(schedule, TRUTH, torch.zeros(16, dtype=torch.float64), tau)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_one_call_a_stage_gives_the_solution_of_many_steps(num_stages: int) -> None:
    oracle = gaussian(0.3, num_stages)
    many = sampled_covariance(oracle.schedule, begin_stages(oracle, "all"), 4, tau=0.3, solver="midpoint", steps=16)
    one = sampled_covariance(oracle.schedule, averaged(oracle, 16), 4, tau=0.3, solver="mean", steps=1)
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-9)
    assert relative_error(one, TRUTH) < 5e-4


def test_two_calls_compose() -> None:
    oracle = gaussian(0.3)
    one = sampled_covariance(oracle.schedule, averaged(oracle, 32), 4, tau=0.3, solver="mean", steps=1)
    two = sampled_covariance(oracle.schedule, averaged(oracle, 16), 4, tau=0.3, solver="mean", steps=2)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_trap_remains_a_trap() -> None:
    """Exact contexts lose the variance of the field's mean with average velocities too (docs/ecar.md, section 5)."""
    kept = {}
    for tau in (0.0, 0.3):
        oracle = gaussian(tau)
        sampled = sampled_covariance(oracle.schedule, averaged(oracle, 32), 4, tau=tau, solver="mean", steps=1)
        kept[tau] = float(sampled.sum() / TRUTH.sum())
    assert kept[0.0] < 0.5
    assert kept[0.3] == pytest.approx(1.0, abs=1e-3)
