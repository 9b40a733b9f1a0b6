"""How many velocity calls Gaussian data with a given spectrum need, from the exact variance error of a solver.

The true velocity of Gaussian data is linear, so it acts on each principal direction separately: a solver multiplies
the coordinate by a number, and the variance of the samples can be computed exactly. Data that are not Gaussian need at
least as many calls in practice. Use the result to compare spectra, or numbers of stages.

Coordinates are those of an orthonormal Haar basis. A direction of `level` j is one that the step from stage j - 1 to
stage j adds; those of level 0 exist from the first stage on. In the block means of a coarser stage its variance is 4
times smaller per stage, while the noise has unit variance in all stages. So stages help with large eigenvalues.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecar_dist.flow.schedule import GAMMA_EXTREME, StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS

TOLERANCE = 0.05  # of the variance of a direction
MOST_STEPS = 128  # the most steps per stage that are tried
COARSE_STEPS = (*range(1, 17), 20, 24, 32, 48, 64, 96, MOST_STEPS)  # with several stages

Variances = Sequence[np.ndarray]  # by level: variances of its directions at full size, float64 [directions]


@dataclass(frozen=True)
class Forecast:
    """The cheapest solver whose variance error is at most TOLERANCE in all directions.

    steps: of each stage, coarse to fine. error: the largest of all directions. calls: of the network, in all stages.
    cost: the same in calls at full size; a call in a coarser stage costs a quarter of one in the next.
    """

    steps: tuple[int, ...]
    error: float
    calls: int
    cost: float


def forecast(variances: Variances, *, time_shift: float = 1.0, solver: str = "midpoint") -> Forecast | None:
    """For as many stages as there are levels, with the default ends. None if MOST_STEPS are not enough."""
    stages = len(variances)
    tried = COARSE_STEPS if stages > 1 else range(1, MOST_STEPS + 1)
    schedule = StageSchedule(uniform_ends(stages), GAMMA_EXTREME)
    each = SOLVERS[solver].calls_per_step

    # What a solver does to the coordinates in one stage does not depend on the other stages.
    gains = {
        (stage, steps): [
            stage_gain(schedule, stage, level, scaled(variances[level], stages - 1 - stage), steps, time_shift, solver)
            for level in range(stage + 1)
        ]
        for stage in range(stages)
        for steps in tried
    }

    # The cheapest first; of equal costs, the smaller number of calls.
    weights = [0.25 ** (stages - 1 - stage) for stage in range(stages)]
    choices = itertools.product(tried, repeat=stages)
    priced = sorted((each * sum(w * n for w, n in zip(weights, steps, strict=True)), steps) for steps in choices)
    for cost, steps in priced:
        error = variance_error(schedule, variances, [gains[stage, count] for stage, count in enumerate(steps)])
        if error <= TOLERANCE:
            return Forecast(steps, error, each * sum(steps), cost)
    return None


def scaled(variances: np.ndarray, halvings: int) -> np.ndarray:
    """The same variances in the block means of a picture that was halved that often, in orthonormal coordinates."""
    return variances / 4.0**halvings


def stage_gain(
    schedule: StageSchedule, stage: int, level: int, variance: np.ndarray, steps: int, time_shift: float, solver: str
) -> np.ndarray:
    """The factors by which the solver multiplies the coordinates of a level in one stage, float64 [directions].

    `variance`: of the data at the size of the stage. On the path of eq. (4), x_u = p z + q n for the datum z and unit
    noise n, and p, q linear in u. The velocity is E[dx/du | x_u] = (p p' variance + q q') / (p^2 variance + q^2) x_u.
    """
    start, end = schedule.starts[stage], schedule.ends[stage]
    first = start if level < stage else 0.0  # a new direction begins as pure noise: U(z_{k-1}) is 0 there
    p_slope, q_slope = end - first, start - end

    def velocity(x: Any, u: float, length: float = 0.0, /) -> Any:
        p = first + u * p_slope
        q = 1.0 - start + u * q_slope
        return (p * p_slope * variance + q * q_slope) / (p**2 * variance + q**2) * x

    ones: Any = np.ones_like(variance)  # a solver is plain arithmetic, so an array can replace the tensor
    gain: Any = SOLVERS[solver](velocity, ones, steps, time_shift)
    return gain


def variance_error(schedule: StageSchedule, variances: Variances, gains: Sequence[Sequence[np.ndarray]]) -> float:
    """The largest |variance of the samples / variance of the data - 1|. `gains`: by stage, then by level."""
    errors = [0.0]
    for level, variance in enumerate(variances):
        if not len(variance):
            continue
        # The variance at the start of the first stage that has this direction, then through its jumps: eq. (6), where
        # orthonormal coordinates double in U, and n' has variance 1 + 3 gamma in block means.
        sample = np.full_like(variance, (1.0 - schedule.starts[level]) ** 2)
        for stage in range(level, schedule.num_stages):
            if stage > level:
                scale, alpha = schedule.jump(stage)
                common = max(0.0, 1.0 + (schedule.block - 1) * schedule.gamma)
                sample = schedule.block * scale**2 * sample + alpha**2 * common
            sample = sample * gains[stage][level] ** 2
        errors.append(float(np.abs(sample / variance - 1.0).max()))
    return max(errors)
