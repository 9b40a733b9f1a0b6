"""Fixed-step ODE solvers for dx/du = v(x, u) from u = 0 to u = 1. To add one, add an entry to SOLVERS.

The grid is uniform and closed: u_i = i h with h = 1 / num_steps, so no velocity call is wasted next to u = 1.
Plain arithmetic on tensors: torch is imported for the types alone, because the configuration reads the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

VelocityFn: TypeAlias = "Callable[[torch.Tensor, float], torch.Tensor]"  # (x, u) -> dx/du, shaped like x
Step: TypeAlias = "Callable[[VelocityFn, torch.Tensor, int, float], torch.Tensor]"  # (v, x at u = i h, i, h) -> next x


@dataclass(frozen=True)
class Solver:
    """`solver(velocity_fn, x, num_steps)` integrates x from u = 0 to u = 1.

    step: one step of the scheme, from u = i h to u = (i + 1) h.
    calls_per_step: velocity calls that a step makes; `ecar-dist plan` counts compute with it.
    """

    step: Step
    calls_per_step: int

    def __call__(self, velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int) -> torch.Tensor:
        h = 1.0 / num_steps
        # A step computes its times from i, since a running sum of h would collect rounding errors.
        for i in range(num_steps):
            x = self.step(velocity_fn, x, i, h)
        return x


def euler(v: VelocityFn, x: torch.Tensor, i: int, h: float) -> torch.Tensor:
    """First order. Shrinks the variance of the samples systematically."""
    return x + h * v(x, i * h)


def midpoint(v: VelocityFn, x: torch.Tensor, i: int, h: float) -> torch.Tensor:
    """Second order: the slope at the middle of the step."""
    # Half an Euler step finds the middle, and the slope there moves x the whole way.
    middle = x + 0.5 * h * v(x, i * h)
    return x + h * v(middle, (i + 0.5) * h)


def heun(v: VelocityFn, x: torch.Tensor, i: int, h: float) -> torch.Tensor:
    """Second order (explicit trapezoid): the mean of the slopes at both ends of the step."""
    # An Euler step predicts the end, and the slope there corrects it.
    first = v(x, i * h)
    second = v(x + h * first, (i + 1) * h)
    return x + 0.5 * h * (first + second)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, calls_per_step=1),
    "midpoint": Solver(midpoint, calls_per_step=2),
    "heun": Solver(heun, calls_per_step=2),
}
