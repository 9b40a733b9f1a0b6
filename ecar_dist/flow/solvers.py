"""Fixed-step ODE solvers for dx/du = v(x, u) from u = 0 to u = 1. To add one, add an entry to SOLVERS.

The grid is closed, from exactly 0 to exactly 1, so no velocity call is wasted close to u = 1. Its steps are equal
unless a time shift is given. Plain arithmetic on tensors. torch is imported only for type annotations, because the
configuration reads the solver names without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


class VelocityFn(Protocol):
    """dx/du at x and u, shaped like x. A network of average velocities averages over [u, u + length]."""

    def __call__(self, x: torch.Tensor, u: float, length: float = 0.0, /) -> torch.Tensor: ...


Step: TypeAlias = "Callable[[VelocityFn, torch.Tensor, float, float], torch.Tensor]"  # (v, x at u, u, end) -> x at end


@dataclass(frozen=True)
class Solver:
    """`solver(velocity_fn, x, num_steps)` integrates x from u = 0 to u = 1, on the grid of `time_grid`.

    step: one step of the scheme, from u to the next point of the grid.
    calls_per_step: velocity calls in one step; `ecar-dist plan` uses it to count compute.
    averages: the scheme needs average velocities, which `flow.objective=mean_velocity` trains.
    """

    step: Step
    calls_per_step: int
    averages: bool = False

    def __call__(
        self, velocity_fn: VelocityFn, x: torch.Tensor, num_steps: int, time_shift: float = 1.0
    ) -> torch.Tensor:
        for u, end in pairwise(time_grid(num_steps, time_shift)):
            x = self.step(velocity_fn, x, u, end)
        return x

    def call_times(self, num_steps: int, time_shift: float = 1.0) -> list[float]:
        """The times u at which a solver of `num_steps` steps evaluates the velocity, in order."""
        times: list[float] = []

        # A solver is plain arithmetic, so a number can take the place of the tensor.
        def record(x: Any, u: float, length: float = 0.0) -> Any:
            times.append(u)
            return x

        start: Any = 0.0
        self(record, start, num_steps, time_shift)
        return times


def time_grid(num_steps: int, time_shift: float = 1.0) -> list[float]:
    """The num_steps + 1 times between which a solver steps, rising from 0 to 1.

    They are i h with h = 1 / num_steps, then shifted:

        u -> u / (u + s (1 - u)).

    This is the time shift of SD3 (Esser et al., arXiv 2403.03206, section 5.3.2), t -> s t / (1 + (s - 1) t),
    for t = 1 - u: there t = 1 is noise, here u = 0 is. The slope is 1 / s at u = 0 and s at u = 1. So s > 1 takes
    shorter steps near noise and longer ones near data; s < 1 does the opposite, and s = 1 changes nothing.
    """
    # Computed from i, since a running sum of h would accumulate rounding errors.
    h = 1.0 / num_steps
    uniform = [*(i * h for i in range(num_steps)), 1.0]
    return [u / (u + time_shift * (1.0 - u)) for u in uniform]


def euler(v: VelocityFn, x: torch.Tensor, u: float, end: float) -> torch.Tensor:
    """First order. Systematically shrinks the variance of the samples."""
    return x + (end - u) * v(x, u)


def midpoint(v: VelocityFn, x: torch.Tensor, u: float, end: float) -> torch.Tensor:
    """Second order: the slope at the middle of the step."""
    # Half an Euler step reaches the middle. The slope there is used for the full step.
    h = end - u
    middle = x + 0.5 * h * v(x, u)
    return x + h * v(middle, 0.5 * (u + end))


def heun(v: VelocityFn, x: torch.Tensor, u: float, end: float) -> torch.Tensor:
    """Second order (explicit trapezoid): the mean of the slopes at both ends of the step."""
    # An Euler step predicts the end, and the slope there corrects it.
    h = end - u
    first = v(x, u)
    second = v(x + h * first, end)
    return x + 0.5 * h * (first + second)


def mean(v: VelocityFn, x: torch.Tensor, u: float, end: float) -> torch.Tensor:
    """Exact where v gives the true average velocity over the step (flow/mean_velocity.py), however long it is."""
    return x + (end - u) * v(x, u, end - u)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, calls_per_step=1),
    "midpoint": Solver(midpoint, calls_per_step=2),
    "heun": Solver(heun, calls_per_step=2),
    "mean": Solver(mean, calls_per_step=1, averages=True),
}
