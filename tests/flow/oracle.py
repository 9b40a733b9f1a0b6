"""Closed-form optimal velocities for Gaussian data and mixtures of Gaussians.

Everything in the training points is linear in a vector of sources: the latents, the white noise of every stage and the
noise on the contexts. The maps come from the production `training_points`, applied to the basis vectors of that space;
only the conditioning of Gaussians is written here. So a wrong training point gives a wrong oracle. The production
sampler, which shares the schedule, the upsampling and the block noise with `training_points`, will show it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch

from ecar_dist.flow.loss import stage_losses
from ecar_dist.flow.multistage import BeginStage, Draw, sample_stages
from ecar_dist.flow.path import TrainingPoints, training_points
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.rng import Purpose

History = Literal["none", "all"]

# A direction whose variance is below this share of the largest counts as deterministic. With tau > 0 none is. With
# exact contexts at the extreme gamma, the coarsest mean of stage 2 always is, and the block means are at u = 0 only: at
# u = 1e-3 their share is above 1e-8, so the two cases are distinguished.
RANK_TOLERANCE = 1e-11


def exponential_covariance(side: int, length: float = 1.5) -> torch.Tensor:
    """exp(-distance / length) between the pixels of a side x side field; [side^2, side^2], float64."""
    axis = torch.arange(side, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)  # [side^2, 2]
    return torch.exp(-torch.cdist(points, points) / length)


def stage_sides(side: int, schedule: StageSchedule) -> list[int]:
    """Sides of the square fields of all stages, coarse to fine; the last one is `side`."""
    return [side // schedule.factor ** (schedule.num_stages - 1 - k) for k in range(schedule.num_stages)]


def split_fields(rows: torch.Tensor, sides: list[int]) -> list[torch.Tensor]:
    """Cut [N, sum of side^2] into fields [N, 1, side, side]."""
    parts = rows.split([side**2 for side in sides], dim=1)
    return [part.reshape(-1, 1, side, side) for part, side in zip(parts, sides, strict=True)]


class Oracle(Protocol):
    """E[d_k | x_u, contexts], the minimiser of eq. (5)."""

    def velocity(self, stage: int, x: torch.Tensor, u: float, contexts: list[torch.Tensor]) -> torch.Tensor:
        """x [B, 1, h, h] and the visible contexts, each [B, 1, h_j, h_j], to a velocity [B, 1, h, h]."""


@dataclass(frozen=True)
class GaussianOracle:
    """Data N(mean, covariance) on a side x side field; contexts are C_j = X^e_j + tau xi_j."""

    schedule: StageSchedule
    covariance: torch.Tensor  # [D, D]
    mean: torch.Tensor  # [D]
    tau: float

    @property
    def side(self) -> int:
        return math.isqrt(len(self.mean))

    @cached_property
    def num_sources(self) -> int:
        sides = stage_sides(self.side, self.schedule)
        return self.side**2 + sum(side**2 for side in sides + sides[:-1])

    @cached_property
    def source_root(self) -> torch.Tensor:
        """R with R^T R = covariance of the sources, [S, S]: the mean squares of a linear map are sums over its rows."""
        white = torch.eye(self.num_sources - len(self.mean), dtype=torch.float64)
        return torch.block_diag(torch.linalg.cholesky(self.covariance).T, white)

    @cached_property
    def source_mean(self) -> torch.Tensor:
        """[1, S]"""
        return torch.nn.functional.pad(self.mean, (0, self.num_sources - len(self.mean)))[None]

    def points(self, sources: torch.Tensor, u: float | torch.Tensor) -> TrainingPoints:
        """Production training points of N source vectors [N, S]: latents, white noise, context noise, in this order.

        `u` is one time for all, or [N, K].
        """
        sides, K = stage_sides(self.side, self.schedule), self.schedule.num_stages
        latents, *draws = split_fields(sources, [self.side, *sides, *sides[:-1]])
        times = torch.as_tensor(u, dtype=sources.dtype).expand(len(sources), K)
        return training_points(self.schedule, latents, draws[:K], list(times.unbind(1)), draws[K:], self.tau)

    @cached_property
    def _maps(self) -> tuple[TrainingPoints, TrainingPoints]:
        """Training points at u = 0 of the scaled basis vectors and of the mean."""
        return self.points(self.source_root, 0.0), self.points(self.source_mean, 0.0)

    def _observed(self, stage: int, u: float, num_contexts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Map [S, M] and mean [1, M] of what the network sees: x_u, then the contexts."""
        both = []
        for points in self._maps:
            x = points.states[stage] + u * points.targets[stage]
            both.append(concatenate(x, points.contexts[:num_contexts]))
        return both[0], both[1]

    def condition(
        self, stage: int, u: float, x: torch.Tensor, contexts: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean of the velocity [B, 1, h, h] and the log density [B], up to a constant, of what was seen."""
        seen, seen_mean = self._observed(stage, u, len(contexts))
        basis, scales = principal_axes(seen.T @ seen)
        whitened = ((concatenate(x, contexts) - seen_mean) @ basis) / scales  # [B, R]
        target, target_mean = (points.targets[stage].flatten(1) for points in self._maps)
        gain = ((seen @ basis) / scales).T @ target  # [R, D]
        log_density = -0.5 * whitened.square().sum(1) - scales.log().sum()
        return (target_mean + whitened @ gain).reshape(x.shape), log_density

    def velocity(self, stage: int, x: torch.Tensor, u: float, contexts: list[torch.Tensor]) -> torch.Tensor:
        return self.condition(stage, u, x, contexts)[0]


@dataclass(frozen=True)
class MixtureOracle:
    """Data from a mixture of Gaussians: the posterior mean is no longer linear."""

    weights: tuple[float, ...]
    components: tuple[GaussianOracle, ...]

    def velocity(self, stage: int, x: torch.Tensor, u: float, contexts: list[torch.Tensor]) -> torch.Tensor:
        velocities, log_densities = zip(*(c.condition(stage, u, x, contexts) for c in self.components), strict=True)
        log_weights = torch.tensor(self.weights, dtype=x.dtype).log()
        share = torch.softmax(torch.stack(log_densities, 1) + log_weights, 1)  # [B, components]
        return torch.einsum("bn,nb...->b...", share, torch.stack(velocities))

    def sample_data(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count, D]"""
        which = torch.multinomial(torch.tensor(self.weights), count, replacement=True, generator=generator)
        dim = len(self.components[0].mean)
        white = torch.randn(count, dim, dtype=torch.float64, generator=generator)
        roots = torch.stack([torch.linalg.cholesky(c.covariance) for c in self.components])
        means = torch.stack([c.mean for c in self.components])
        return means[which] + torch.einsum("bij,bj->bi", roots[which], white)


def concatenate(x: torch.Tensor, contexts: list[torch.Tensor]) -> torch.Tensor:
    """[B, M]"""
    return torch.cat([x.flatten(1), *(context.flatten(1) for context in contexts)], dim=1)


def principal_axes(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal axes [M, R] and standard deviations [R] of a covariance [M, M], without deterministic directions."""
    variances, axes = torch.linalg.eigh(covariance)
    kept = variances > RANK_TOLERANCE * variances[-1]
    return axes[:, kept], variances[kept].sqrt()


def expected_losses(oracle: Oracle, data: GaussianOracle, history: History) -> torch.Tensor:
    """E of eq. (5) with u uniform, per stage [K], by the production loss: exact in the data, 20 Gauss nodes in u."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = torch.zeros(data.schedule.num_stages, dtype=torch.float64)
    for u, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        points = data.points(data.source_root, u)
        seen = [points.contexts[:k] if history == "all" else [] for k in range(data.schedule.num_stages)]
        velocities = [oracle.velocity(k, points.states[k], u, seen[k]) for k in range(data.schedule.num_stages)]
        total += weight * stage_losses(velocities, points.targets).sum(0)
    return total


def begin_stages(oracle: Oracle, history: History) -> BeginStage:
    """What `sample_stages` calls: stage k's velocity given no context, or all of C_0 .. C_{k-1}."""
    seen: list[torch.Tensor] = []

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        if context is not None and history == "all":
            seen.append(context)
        contexts = list(seen)
        return lambda x, u: oracle.velocity(stage, x, u, contexts)

    return begin_stage


def basis_draws(schedule: StageSchedule, side: int) -> Draw:
    """Draws whose batch is the basis of all random numbers of a sampling run.

    A linear sampler then returns its own matrix, [number of random numbers, 1, side, side]: no Monte Carlo.
    """
    sides = stage_sides(side, schedule)
    purposes = [(Purpose.GENERATE_START, 0)]
    purposes += [(Purpose.GENERATE_JUMP, k) for k in range(1, schedule.num_stages)]
    purposes += [(Purpose.GENERATE_CONTEXT, k) for k in range(schedule.num_stages - 1)]
    drawn_sides = [sides[k] for _, k in purposes]
    basis = torch.eye(sum(n**2 for n in drawn_sides), dtype=torch.float64)
    fields = dict(zip(purposes, split_fields(basis, drawn_sides), strict=True))
    return lambda purpose, stage: fields[purpose, stage]


def sampled_covariance(
    schedule: StageSchedule,
    begin_stage: BeginStage,
    side: int,
    *,
    tau: float,
    solver: str,
    steps: int,
    time_shift: float = 1.0,
) -> torch.Tensor:
    """Exact covariance [D, D] of the production sampler's output under linear velocities."""
    draw, each = basis_draws(schedule, side), [steps] * schedule.num_stages
    ends = sample_stages(
        schedule, begin_stage, draw, tau=tau, solver=SOLVERS[solver], steps_per_stage=each, time_shift=time_shift
    )
    matrix = ends[-1].flatten(1)  # [draws, D]
    return matrix.T @ matrix


def relative_error(covariance: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((covariance - truth).norm() / truth.norm())
