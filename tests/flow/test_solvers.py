from __future__ import annotations

import itertools
import math

import pytest
import torch

from ecar_dist.flow.solvers import SOLVERS, VelocityFn

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2}
GRIDS = {  # where u is evaluated with four steps: no call beyond 1, none wasted close to it
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
    assert SOLVERS.keys() == ORDERS.keys() == GRIDS.keys()


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    exact = SOLVERS["midpoint"](pendulum, starts(), 2048)
    errors = [(SOLVERS[name](pendulum, starts(), steps) - exact).norm().item() for steps in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.1)


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
