"""Stage windows and jump coefficients: pure arithmetic on Python floats.

Time is the signal coefficient: 0 is noise, 1 is data. Stage k moves from coefficient s_k to e_k at its own resolution.
Equation numbers are those of docs/ecar.md; the construction is Pyramid Flow's (Jin et al., arXiv 2410.05954, eq. 9-11).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from ecar_dist.errors import ConfigError

GAMMA_EXTREME = -1.0 / 3.0  # the least renoising for 2x upsampling: the block covariance is singular there


def uniform_ends(num_stages: int) -> tuple[float, ...]:
    """e_k = (k + 1) / K."""
    return tuple((k + 1) / num_stages for k in range(num_stages))


@dataclass(frozen=True)
class StageSchedule:
    """Windows [s_k, e_k] of K stages, each `factor` times finer than the one before.

    `gamma` is the correlation between two pixels of one block of jump noise. Blocks have n_b = factor^2 pixels, so the
    covariance is positive semidefinite from gamma = -1/(n_b - 1), the least renoising, upwards.

    Raises ConfigError if the ends or gamma are out of range.
    """

    ends: tuple[float, ...]
    gamma: float = GAMMA_EXTREME
    factor: int = 2

    def __post_init__(self) -> None:
        # written so that NaN is refused too
        rising = all(a < b for a, b in itertools.pairwise((0.0, *self.ends)))
        if not self.ends or self.ends[-1] != 1.0 or not rising:
            raise ConfigError(
                f"flow.ends={list(self.ends)} must increase strictly within (0, 1] and end at 1; null gives (k+1)/K"
            )
        if not self.gamma_extreme - 1e-9 <= self.gamma < 0:
            raise ConfigError(
                f"flow.gamma={self.gamma} is outside [{self.gamma_extreme:.4f}, 0), the range for blocks of "
                f"{self.block} pixels; {self.gamma_extreme} is the least renoising"
            )

    @property
    def num_stages(self) -> int:
        return len(self.ends)

    @property
    def block(self) -> int:
        """n_b, pixels of one upsampled block."""
        return self.factor**2

    @property
    def gamma_extreme(self) -> float:
        return -1.0 / (self.block - 1)

    @cached_property
    def starts(self) -> tuple[float, ...]:
        """s_k for every stage: s_0 = 0, then eq. (8) from the end of the previous stage."""
        # Stage 0 starts at pure noise. Each later start follows from the end of the previous stage.
        return (0.0, *(start_after(end, self.gamma) for end in self.ends[:-1]))

    def jump(self, stage: int) -> tuple[float, float]:
        """(a, alpha) of eq. (6)-(7): X^s_k = a U(X^e_{k-1}) + alpha n', for the jump into `stage` >= 1."""
        start = self.starts[stage]
        # a matches the means of the two laws; alpha raises the variance to (1 - s)^2.
        return start / self.ends[stage - 1], (1.0 - start) / math.sqrt(1.0 - self.gamma)

    @cached_property
    def model_windows(self) -> tuple[tuple[float, float], ...]:
        """[lo_k, hi_k]: [0, 1] split in proportion to e_k - s_k, so that no two stages share a model time."""
        lengths = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        # The last edge is exactly 1, whatever the rounding of the sums.
        edges = [sum(lengths[:k]) / sum(lengths) for k in range(self.num_stages)] + [1.0]
        return tuple(itertools.pairwise(edges))

    def model_time(self, stage: int, u: float) -> float:
        """mt_k(u) of a single time; see `path.model_time`."""
        low, high = self.model_windows[stage]
        return low + u * (high - low)

    def context_scales(self, tau: float) -> tuple[float, ...]:
        """1 / std of C_k = X^e_k + tau xi for unit-variance latents, for every stage that is fed back (k < K-1)."""
        # Var C_k = e^2 + (1 - e)^2 + tau^2: latent, path noise and context noise are independent.
        return tuple(1.0 / math.sqrt(end**2 + (1.0 - end) ** 2 + tau**2) for end in self.ends[:-1])


def start_after(end: float, gamma: float) -> float:
    """s_k from e_{k-1}, eq. (8)."""
    # The jump multiplies the signal-to-noise ratio by sqrt(-gamma) / sqrt(1 - gamma), whatever e is.
    keep = math.sqrt(-gamma) * end
    return keep / (math.sqrt(1.0 - gamma) * (1.0 - end) + keep)


def end_before(start: float, gamma: float) -> float:
    """e_{k-1} from s_k, eq. (9): the inverse of `start_after`."""
    keep = math.sqrt(1.0 - gamma) * start
    return keep / ((1.0 - start) * math.sqrt(-gamma) + keep)
