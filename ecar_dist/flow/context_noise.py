"""How much noise on the fed-back states is enough: docs/ecar.md, section 5, where tau is small but not zero.

With little noise the start of a stage is almost known, given the contexts, and the velocity has to spread it out within
the first part of the stage: the solver needs steps in proportion to 1 / tau. This follows the mean of a Gaussian field,
which suffers most, through the sampler. Free of torch, so that `ecar-dist check` can state it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ecar_dist.flow.schedule import StageSchedule

Array = npt.NDArray[np.float64]

SMALLEST_TAU = 0.1  # keeps 99 % of the variance at the default 8 midpoint steps (test); .03 keeps 76 %
MOST_STEPS = 4096  # that are tried


def kept_variance(schedule: StageSchedule, tau: float, steps: int, *, variance: float) -> float:
    """Share of the variance of the field's mean that `steps` midpoint steps a stage leave, with optimal velocities.

    variance: of the mean of the latents, in units of the noise on a pixel of the coarsest stage; for latents of unit
    variance at most the number of that stage's pixels.

    All is linear, so each quantity is a row of coefficients: of (latent, noise, context noises) in training, and of
    (start, jump noises, context noises) in sampling. Nothing is drawn.
    """
    K = schedule.num_stages
    trained = _Rows(schedule, tau, variance)
    sources = np.eye(2 * K)
    x, contexts = sources[0], np.empty((0, 2 * K))

    for stage in range(K):
        if stage > 0:
            contexts = np.vstack([contexts, x + tau * trained.pixel_noise(stage - 1) * sources[K + stage - 1]])
            scale, alpha = schedule.jump(stage)
            x = scale * x + alpha * trained.block_noise(stage) * sources[stage]
        x = _through(trained, stage, x, contexts, steps)
    return float(x @ x) / variance


def steps_to_keep(schedule: StageSchedule, tau: float, share: float, *, variance: float) -> int | None:
    """The fewest midpoint steps a stage after which `share` is left; None where MOST_STEPS do not suffice."""

    def enough(steps: int) -> bool:
        return kept_variance(schedule, tau, steps, variance=variance) >= share

    above = 1
    while not enough(above):
        if above >= MOST_STEPS:
            return None
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above


class _Rows:
    """What training makes of the mean of the field, as rows over (latent, noises, context noises): float64 [2 K].

    The mean of the latents is the same at every stage. The std of that of the noise falls by the factor from one stage
    to the next, by eq. (14); at the extreme gamma the stage's own share of it is zero.
    """

    def __init__(self, schedule: StageSchedule, tau: float, variance: float) -> None:
        self._schedule, K = schedule, schedule.num_stages
        sources = np.eye(2 * K)
        # 0: the latent; 1 .. K: what each stage adds to the noise; K + 1 .. 2 K - 1: the noise on the contexts
        self._latent = np.sqrt(variance) * sources[0]
        self._noises = [sources[1]]
        for stage in range(1, K):
            inherited = np.sqrt(-schedule.gamma / (1.0 - schedule.gamma)) * self._noises[-1]
            own = self.block_noise(stage) / np.sqrt(1.0 - schedule.gamma) * sources[1 + stage]
            self._noises.append(inherited + own)
        ends = [self._end(stage) for stage in range(K - 1)]
        self.contexts = np.array(
            [end + tau * self.pixel_noise(k) * sources[1 + K + k] for k, end in enumerate(ends)]
        ).reshape(-1, 2 * K)

    def pixel_noise(self, stage: int) -> float:
        """Std of the mean of white noise at a stage, in units of that of the coarsest."""
        return float(self._schedule.factor**-stage)

    def block_noise(self, stage: int) -> float:
        """The same of the jump noise n' of eq. (15): only its part that is common to a block is left."""
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


def _through(trained: _Rows, stage: int, x: Array, contexts: Array, steps: int) -> Array:
    """The sampled state after one stage of midpoint steps with v = E[d | x_u, contexts]."""
    start, end = trained.path(stage)
    seen = trained.contexts[:stage]
    # what the contexts tell of both ends; what they leave open moves along the line between the two
    told = np.linalg.lstsq(seen @ seen.T, seen @ np.stack([start, end], axis=1), rcond=None)[0]  # [contexts, 2]
    open_start, open_end = start - told[:, 0] @ seen, end - told[:, 1] @ seen

    def slope(u: float) -> float:
        state = (1.0 - u) * open_start + u * open_end
        return float((open_end - open_start) @ state / (state @ state))

    factor, h = 1.0, 1.0 / steps
    for i in range(steps):
        factor *= 1.0 + h * slope((i + 0.5) * h) * (1.0 + 0.5 * h * slope(i * h))
    return told[:, 1] @ contexts + factor * (x - told[:, 0] @ contexts)
