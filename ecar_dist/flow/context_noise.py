"""How much noise the fed-back states need, for a tau that is small but not zero; section 5 of docs/ecar.md.

With little noise the contexts almost determine the start of a stage, and the velocity has to create the spread of the
stage's end early in the stage. The number of solver steps needed is proportional to 1 / tau. This module follows the
mean of a Gaussian field, which suffers most, through the sampler. It does not import torch, so that `ecar-dist check`
can report the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.flow.solvers import time_grid

Array = npt.NDArray[np.float64]

SMALLEST_TAU = 0.1  # keeps 99 % of the variance at the default 8 midpoint steps (test); 0.03 keeps 76 %
MOST_STEPS = 4096  # the most that `steps_to_keep` tries


def kept_variance(
    schedule: StageSchedule, tau: float, steps: Sequence[int], *, variance: float, time_shift: float = 1.0
) -> float:
    """Share of the variance of the field's mean that is left after sampling with optimal velocities.

    Everything is linear in independent unit normals, so each quantity is a row of coefficients: over (latent, noises,
    context noises) in training, and over (start, jump noises, context noises) in sampling. No random numbers are drawn.

    Arguments:
        steps: midpoint steps of every stage.
        time_shift: time shift of their grid (flow/solvers.py).
        variance: variance of the mean of the latents, in units of the noise on a pixel of the coarsest stage. For
            latents of unit variance it is at most the number of pixels of that stage.
    """
    K = schedule.num_stages
    trained = _Rows(schedule, tau, variance)
    sources = np.eye(2 * K)

    # As in flow/multistage.py: start from noise, feed back, jump, integrate.
    x = sources[0]
    contexts = np.empty((0, 2 * K))
    for stage in range(K):
        if stage > 0:
            contexts = np.vstack([contexts, x + tau * trained.pixel_noise(stage - 1) * sources[K + stage - 1]])
            scale, alpha = schedule.jump(stage)
            x = scale * x + alpha * trained.block_noise(stage) * sources[stage]
        x = _through(trained, stage, x, contexts, time_grid(steps[stage], time_shift))
    return float(x @ x) / variance


def steps_to_keep(
    schedule: StageSchedule, tau: float, share: float, *, variance: float, time_shift: float = 1.0
) -> int | None:
    """The fewest midpoint steps in each stage that keep `share` of the variance; None if MOST_STEPS are too few."""

    def enough(steps: int) -> bool:
        each = [steps] * schedule.num_stages
        return kept_variance(schedule, tau, each, variance=variance, time_shift=time_shift) >= share

    # Double until it is enough.
    above = 1
    while not enough(above):
        if above >= MOST_STEPS:
            return None
        above *= 2

    # Bisect: `below` is not enough, `above` is.
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        if enough(middle):
            above = middle
        else:
            below = middle
    return above


class _Rows:
    """The mean of the field in training, as rows over (latent, noises, context noises): float64 [2 K].

    The mean of the latents is the same at every stage. By eq. (14), the std of the mean of the noise is divided by
    `factor` from one stage to the next; at the extreme gamma the stage's own contribution to it is zero.
    """

    def __init__(self, schedule: StageSchedule, tau: float, variance: float) -> None:
        self._schedule = schedule
        K = schedule.num_stages
        # 0: the latent; 1 .. K: what each stage adds to the noise; K + 1 .. 2 K - 1: the noise on the contexts
        sources = np.eye(2 * K)
        self._latent = np.sqrt(variance) * sources[0]

        # n_0 .. n_{K-1}, eq. (14)
        self._noises = [sources[1]]
        for stage in range(1, K):
            inherited = np.sqrt(-schedule.gamma / (1.0 - schedule.gamma)) * self._noises[-1]
            own = self.block_noise(stage) / np.sqrt(1.0 - schedule.gamma) * sources[1 + stage]
            self._noises.append(inherited + own)

        # C_k = X^e_k + tau xi_k
        ends = [self._end(stage) for stage in range(K - 1)]
        self.contexts = np.array(
            [end + tau * self.pixel_noise(k) * sources[1 + K + k] for k, end in enumerate(ends)]
        ).reshape(-1, 2 * K)

    def pixel_noise(self, stage: int) -> float:
        """Std of the mean of white noise at a stage, in units of that at the coarsest stage."""
        return float(self._schedule.factor**-stage)

    def block_noise(self, stage: int) -> float:
        """Std of the mean of the jump noise n' of eq. (15): only the part that is common to a block contributes."""
        schedule = self._schedule
        common = max(0.0, 1.0 + (schedule.block - 1) * schedule.gamma)
        return float(np.sqrt(common)) * self.pixel_noise(stage)

    def _end(self, stage: int) -> Array:
        end = self._schedule.ends[stage]
        return end * self._latent + (1.0 - end) * self._noises[stage]

    def path(self, stage: int) -> tuple[Array, Array]:
        """X^s_k and X^e_k, eq. (1)-(3)."""
        start = self._schedule.starts[stage]
        latent = self._latent if stage else 0.0 * self._latent
        return start * latent + (1.0 - start) * self._noises[stage], self._end(stage)


def _through(trained: _Rows, stage: int, x: Array, contexts: Array, times: Sequence[float]) -> Array:
    """The sampled state after one stage of midpoint steps between `times`, with v = E[d | x_u, contexts]."""
    # Regress both ends of the path on the contexts. The residuals move along the line between the two ends.
    start, end = trained.path(stage)
    seen = trained.contexts[:stage]
    weights = np.linalg.lstsq(seen @ seen.T, seen @ np.stack([start, end], axis=1), rcond=None)[0]  # [contexts, 2]
    residual_start = start - weights[:, 0] @ seen
    residual_end = end - weights[:, 1] @ seen

    # The optimal velocity of the residual is slope(u) x: the regression of d on x_u.
    def slope(u: float) -> float:
        state = (1.0 - u) * residual_start + u * residual_end
        return float((residual_end - residual_start) @ state / (state @ state))

    # So every midpoint step multiplies the residual by a scalar.
    factor = 1.0
    for u, end_u in pairwise(times):
        h = end_u - u
        factor *= 1.0 + h * slope(0.5 * (u + end_u)) * (1.0 + 0.5 * h * slope(u))
    return weights[:, 1] @ contexts + factor * (x - weights[:, 0] @ contexts)
