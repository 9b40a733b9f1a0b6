from __future__ import annotations

import itertools
import math

import pytest
import torch

from ecar_dist.flow.solvers import SOLVERS, VelocityFn, time_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2}
GRIDS = {  # where u is evaluated in four steps: no call beyond 1, none wasted close to it
    "euler": [0, 0.25, 0.5, 0.75],
    "midpoint": [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875],
    "heun": [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1],
}


def pendulum(x: torch.Tensor, u: float) -> torch.Tensor:
    """A nonlinear velocity that depends on time; x [B, 2]."""
    angle, speed = x.unbind(1)
    return torch.stack((speed, -torch.sin(angle) + math.cos(3 * u)), dim=1)


def starts() -> torch.Tensor:
    return torch.tensor([[0.3, -0.2], [1.2, 0.5]], dtype=torch.float64)


def test_every_solver_is_covered() -> None:
    of_velocities = {name for name, solver in SOLVERS.items() if not solver.averages}  # others: test_mean_velocity.py
    assert of_velocities == ORDERS.keys() == GRIDS.keys()


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    exact = SOLVERS["midpoint"](pendulum, starts(), 2048)
    errors = [(SOLVERS[name](pendulum, starts(), steps) - exact).norm().item() for steps in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.1)


def test_a_shifted_grid_is_shorter_near_noise_by_sd3s_formula() -> None:
    assert time_grid(4, 3.0) == pytest.approx([0, 1 / 10, 1 / 4, 1 / 2, 1])  # u / (u + 3 (1 - u)), by hand
    for shift in (0.2, 0.7, 1.0, 1.1, 3.0, 17.0):
        for steps in (1, 7, 49, 50):
            times = time_grid(steps, shift)
            assert len(times) == steps + 1
            assert (times[0], times[-1]) == (0.0, 1.0)
            assert times == sorted(set(times))

            # SD3's own form, whose time runs from 1 at noise to 0 at data
            theirs = [1.0 - i / steps for i in range(steps + 1)]
            assert times == pytest.approx([1.0 - shift * t / (1.0 + (shift - 1.0) * t) for t in theirs], abs=1e-12)

            # step lengths: from 1 / shift times the mean at noise to shift times the mean at data
            lengths = [end - u for u, end in itertools.pairwise(times)]
            if shift != 1.0:
                assert lengths == sorted(lengths, reverse=shift < 1.0)
    assert time_grid(1000, 4.0)[1] == pytest.approx(1 / 4000, rel=1e-2)
    assert 1.0 - time_grid(1000, 4.0)[-2] == pytest.approx(4 / 1000, rel=1e-2)


def test_a_shift_of_1_is_the_uniform_grid_to_the_last_bit() -> None:
    for steps in range(1, 300):
        assert time_grid(steps) == time_grid(steps, 1.0) == [*(i * (1.0 / steps) for i in range(steps)), 1.0]


def by_index(name: str, v: VelocityFn, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The schemes on a uniform grid, written with the step number instead of two times."""
    h = 1.0 / num_steps
    for i in range(num_steps):
        first = v(x, i * h)
        if name == "euler":
            x = x + h * first
        elif name == "midpoint":
            x = x + h * v(x + 0.5 * h * first, (i + 0.5) * h)
        else:
            x = x + 0.5 * h * (first + v(x + h * first, (i + 1) * h))
    return x


@pytest.mark.parametrize("name", ORDERS)
def test_without_a_shift_samples_are_those_of_equal_steps_bit_for_bit(name: str) -> None:
    """In float32, like the sampler's states and times."""

    def velocity(x: torch.Tensor, u: float) -> torch.Tensor:
        return pendulum(x, 0.0) * torch.full((2, 1), u)

    for steps in range(1, 50):
        x = starts().float()
        assert torch.equal(SOLVERS[name](velocity, x, steps), by_index(name, velocity, x, steps))


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_order_of_convergence_is_kept_on_a_shifted_grid(name: str, shift: float) -> None:
    exact = SOLVERS["midpoint"](pendulum, starts(), 2048)
    errors = [(SOLVERS[name](pendulum, starts(), steps, shift) - exact).norm().item() for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_is_uniform_and_closed(name: str) -> None:
    times: list[float] = []

    def record(x: torch.Tensor, u: float) -> torch.Tensor:
        times.append(u)
        return torch.ones_like(x)

    x = SOLVERS[name](record, torch.zeros(1, 2, dtype=torch.float64), 4)
    assert times == GRIDS[name]
    assert len(times) == 4 * SOLVERS[name].calls_per_step
    assert torch.equal(x, torch.ones(1, 2, dtype=torch.float64))  # the steps add up to u = 1


@pytest.mark.parametrize("name", ORDERS)
def test_straight_paths_need_one_step(name: str) -> None:
    """A velocity that does not change along the path is integrated exactly."""
    start, end = starts(), starts() * 2 + 1
    velocity: VelocityFn = lambda x, u: end - start  # noqa: E731
    torch.testing.assert_close(SOLVERS[name](velocity, start, 1), end)


@pytest.mark.parametrize("name", ["midpoint", "heun"])
def test_second_order_is_exact_on_velocities_linear_in_time(name: str) -> None:
    x = SOLVERS[name](lambda x, u: torch.full_like(x, 2 * u), starts(), 3)
    torch.testing.assert_close(x, starts() + 1)


@pytest.mark.parametrize("name", ORDERS)
def test_the_start_is_left_alone(name: str) -> None:
    x = starts()
    SOLVERS[name](pendulum, x, 2)
    assert torch.equal(x, starts())
