"""The trap of docs/ecar.md, as learned by small networks: 2 x 2 pixels, two stages, the production path and sampler.

The linear model that approaches the closed form is in test_multistage.py. Networks like these find the closed form too:
the sound setting keeps the variance of a block's mean, and the control loses as much of it as its oracle does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ecar_dist.flow.loss import stage_losses
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.path import TrainingPoints
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS, VelocityFn
from ecar_dist.rng import Purpose, normal
from tests.flow.oracle import (
    GaussianOracle,
    begin_stages,
    concatenate,
    expected_losses,
    sampled_covariance,
    stage_sides,
)

SCHEDULE = StageSchedule(uniform_ends(2))
TRUTH = 0.35 * torch.eye(4, dtype=torch.float64) + 0.65  # any two pixels of the block have correlation .65
NUM_STEPS, BATCH_SIZE, NUM_SAMPLES = 1000, 2048, 40_000


def field(tau: float) -> GaussianOracle:
    return GaussianOracle(SCHEDULE, TRUTH, torch.zeros(4, dtype=torch.float64), tau)


class ToyNetwork(nn.Module):
    """A velocity for each stage, from x_u, u and all C_j of the coarser stages."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        pixels = [side**2 for side in stage_sides(2, SCHEDULE)]
        seen = [sum(pixels[: k + 1]) + 1 for k in range(len(pixels))]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
            )
            for inputs, outputs in zip(seen, pixels, strict=True)
        )

    def velocity(self, stage: int, x: torch.Tensor, u: torch.Tensor, contexts: list[torch.Tensor]) -> torch.Tensor:
        """x [B, 1, h, h], u [B]."""
        seen = torch.cat((concatenate(x, contexts), u[:, None]), dim=1)
        return self.stages[stage](seen).reshape(x.shape)

    def losses(self, points: TrainingPoints, times: torch.Tensor) -> torch.Tensor:
        """The loss of each stage over a batch; [K]."""
        velocities = [
            self.velocity(k, state, times[:, k], points.contexts[:k]) for k, state in enumerate(points.states)
        ]
        return stage_losses(velocities, points.targets).mean(0)


def batches(data: GaussianOracle) -> Callable[[int], tuple[TrainingPoints, torch.Tensor]]:
    """Production training points from fresh random sources, in float32, and their times [B, K]."""
    generator, root = torch.Generator().manual_seed(0), data.source_root.float()

    def draw(count: int) -> tuple[TrainingPoints, torch.Tensor]:
        times = torch.rand(count, SCHEDULE.num_stages, generator=generator)
        return data.points(torch.randn(count, data.num_sources, generator=generator) @ root, times), times

    return draw


def trained(tau: float) -> tuple[ToyNetwork, torch.Tensor]:
    """The network, and its losses [K] on fresh data."""
    torch.manual_seed(0)
    network, draw = ToyNetwork(), batches(field(tau))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        network.losses(*draw(BATCH_SIZE)).sum().backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return network, network.losses(*draw(NUM_SAMPLES))


@torch.no_grad()
def sampled_mean_variance(network: ToyNetwork, tau: float) -> float:
    """Variance of the block's mean in samples, by 50 Euler steps per stage, as a share of the truth."""
    positions, sides = torch.arange(NUM_SAMPLES), stage_sides(2, SCHEDULE)

    def draw(purpose: Purpose, stage: int) -> torch.Tensor:
        return normal(0, positions, purpose, (1, sides[stage], sides[stage]), stream=stage)

    def begin_stage(stage: int, context: torch.Tensor | None) -> VelocityFn:
        contexts = [] if context is None else [context]  # with two stages there is at most one context
        return lambda x, u: network.velocity(stage, x, torch.full((len(x),), u), contexts)

    each = [50] * SCHEDULE.num_stages
    ends = sample_stages(SCHEDULE, begin_stage, draw, tau=tau, solver=SOLVERS["euler"], steps_per_stage=each)
    return float(ends[-1].mean(dim=(1, 2, 3)).var() / TRUTH.mean())


def oracle_mean_variance(tau: float) -> float:
    stages = begin_stages(field(tau), "all")
    return float(sampled_covariance(SCHEDULE, stages, 2, tau=tau, solver="euler", steps=50).mean() / TRUTH.mean())


def best_losses(tau: float) -> list[float]:
    return expected_losses(field(tau), field(tau), "all").tolist()


def test_noisy_states_keep_the_variance_of_the_mean() -> None:
    network, losses = trained(0.3)
    assert losses.tolist() == pytest.approx(best_losses(0.3), rel=0.03)
    assert 0.95 < sampled_mean_variance(network, 0.3) < 1.05


def test_exact_states_lose_it_and_have_the_lower_loss() -> None:
    """Negative control: the loss is lower than in the sound setting, near its optimum, and the samples are worse."""
    network, losses = trained(0.0)
    assert losses.tolist() == pytest.approx(best_losses(0.0), rel=0.04)
    assert losses[1] < 0.8 * best_losses(0.3)[1]
    assert oracle_mean_variance(0.0) == pytest.approx(0.42, abs=0.006)
    assert sampled_mean_variance(network, 0.0) == pytest.approx(0.42, abs=0.05)
