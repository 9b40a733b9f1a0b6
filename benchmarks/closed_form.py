"""Contexts, solvers and tau in closed form: the production sampler with the optimal velocities of a Gaussian field.

The oracle is that of the tests (tests/flow/oracle.py): exact, without training or Monte Carlo, in seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ecar_dist.flow.pyramid import downsample, upsample
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS
from tests.flow.oracle import (
    GaussianOracle,
    History,
    begin_stages,
    expected_losses,
    exponential_covariance,
    relative_error,
    sampled_covariance,
)

SIDE, NUM_STAGES, TAU = 4, 3, 0.3
TRUTH = exponential_covariance(SIDE)  # exp(-distance / 1.5), [16, 16]
LIMIT_STEPS = 1000  # Euler steps per stage, where the number of steps must not matter
TOLD: tuple[tuple[str, History, float], ...] = (
    ("nothing", "none", TAU),
    ("states + noise,\n$\\tau$ = 1", "all", 1.0),
    ("states + noise,\n$\\tau$ = 0.3 (default)", "all", TAU),
    ("states + noise,\n$\\tau$ = 0.1", "all", 0.1),
    ("exact states\n($\\tau$ = 0)", "all", 0.0),
)


def oracle(tau: float) -> GaussianOracle:
    return GaussianOracle(StageSchedule(uniform_ends(NUM_STAGES)), TRUTH, torch.zeros(SIDE**2).double(), tau)


def sampled(history: History, tau: float, solver: str, steps: int) -> torch.Tensor:
    """The covariance of the samples that the production sampler draws with the optimal velocities, [16, 16]."""
    best = oracle(tau)
    return sampled_covariance(best.schedule, begin_stages(best, history), SIDE, tau=tau, solver=solver, steps=steps)


def mean_loss(history: History, tau: float) -> float:
    """The lowest possible training loss, as a mean over all stages."""
    return float(expected_losses(oracle(tau), oracle(tau), history).mean())


def errors(history: History, tau: float, solver: str, calls: int) -> dict[str, Any]:
    """Errors of the samples' covariance with `calls` velocity calls per stage."""
    covariance = sampled(history, tau, solver, calls // SOLVERS[solver].calls_per_step)
    return {
        "solver": solver,
        "calls": calls,
        "covariance error": relative_error(covariance, TRUTH),
        "variance share": float(covariance.trace() / TRUTH.trace()),
    }


def tau_row(tau: float) -> dict[str, Any]:
    """The loss with this noise on the contexts, and the error that 16 calls per stage leave."""
    return {
        "tau": tau,
        "loss": mean_loss("all", tau),
        "loss without context": mean_loss("none", tau),
        **{solver: errors("all", tau, solver, 16)["covariance error"] for solver in SOLVERS},
    }


def bands() -> dict[str, torch.Tensor]:
    """Projections [16, 16] onto the field's mean, onto what the means of 2 x 2 blocks add to it, and onto the rest."""
    pixels = torch.eye(SIDE**2).double().reshape(-1, 1, SIDE, SIDE)
    means = [upsample(downsample(pixels, side), side).flatten(1) for side in (4, 2, 1)]
    names = ("mean of the field", "2 x 2 blocks", "single pixels")
    return dict(zip(names, (means[0], means[1] - means[0], means[2] - means[1]), strict=True))


def trap_picture(path: Path) -> None:
    """The loss that training can reach, and the variance of samples, by what a stage sees of the coarser stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name, _, _ in TOLD]
    losses = [mean_loss(history, tau) for _, history, tau in TOLD]
    found = [sampled(history, tau, "euler", LIMIT_STEPS) for _, history, tau in TOLD]
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True)
    bars = left.bar(names, losses, width=0.55, color=["tab:gray"] * (len(names) - 1) + ["tab:red"])
    left.bar_label(bars, fmt="%.3f")
    left.set(title="Training: the best loss that a network can reach", ylabel="loss", ylim=(0, 1.2 * max(losses)))
    for i, (name, projection) in enumerate(bands().items()):
        shares = [float((projection @ covariance).trace() / (projection @ TRUTH).trace()) for covariance in found]
        places = [at + 0.22 * (i - 1) for at in range(len(names))]
        group = right.bar(places, shares, width=0.2, label=name, color=plt.get_cmap("viridis")(0.1 + 0.35 * i))
        right.bar_label(group, fmt="%.2f", fontsize=8)
    right.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    right.set(title="Sampling with that same network", ylabel="variance of samples / of data", ylim=(0, 1.5))
    right.set_xlabel("what a stage sees of the states of the coarser stages")
    right.legend(ncols=3, loc="upper center", fontsize=9, title="direction, coarse to fine")
    figure.suptitle("Closed form: Gaussian field of 4 x 4 pixels, three stages", fontsize=9, color="gray")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
