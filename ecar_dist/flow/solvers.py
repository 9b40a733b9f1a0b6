"""Fixed-step ODE solvers on u in [0, 1]: one signature, `solver(velocity_fn, x, num_steps) -> x` at u = 1.

The grid is uniform and closed: num_steps intervals, no evaluation wasted at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

VelocityFn: TypeAlias = "Callable[[torch.Tensor, float], torch.Tensor]"
Solver: TypeAlias = "Callable[[VelocityFn, torch.Tensor, int], torch.Tensor]"


def euler(velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """First order, one call a step. Shrinks the variance of the samples systematically."""
    h = 1.0 / num_steps
    for i in range(num_steps):
        x = x + h * velocity_fn(x, i * h)
    return x


def midpoint(velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Second order, two calls a step."""
    h = 1.0 / num_steps
    for i in range(num_steps):
        half = x + 0.5 * h * velocity_fn(x, i * h)
        x = x + h * velocity_fn(half, (i + 0.5) * h)
    return x


def heun(velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Second order (explicit trapezoid), two calls a step."""
    h = 1.0 / num_steps
    for i in range(num_steps):
        first = velocity_fn(x, i * h)
        second = velocity_fn(x + h * first, (i + 1) * h)
        x = x + 0.5 * h * (first + second)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "midpoint": midpoint, "heun": heun}
CALLS_PER_STEP: dict[str, int] = {"euler": 1, "midpoint": 2, "heun": 2}
