"""Losses against closed forms. Setting: 4 x 4 Gaussian field, covariance exp(-distance / 1.5), K = 3, gamma = -1/3."""

from __future__ import annotations

import pytest
import torch

from ecar_dist.flow.loss import multistage_loss, stage_losses
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from tests.flow.oracle import GaussianOracle, History, expected_losses, exponential_covariance

# E |d|^2 per element: the loss of a network that outputs zero.
ZERO_LOSSES = [0.1472, 0.4127, 0.7969]


def field(tau: float) -> GaussianOracle:
    mean = torch.zeros(16, dtype=torch.float64)
    return GaussianOracle(StageSchedule(uniform_ends(3)), exponential_covariance(4), mean, tau)


@pytest.mark.parametrize(
    ("tau", "history", "expected"),
    [(0.3, "none", [0.0527, 0.3306, 0.5169]), (0.3, "all", [0.0527, 0.2798, 0.4726])],
)
def test_bayes_optimal_losses(tau: float, history: History, expected: list[float]) -> None:
    oracle = field(tau)
    assert expected_losses(oracle, oracle, history).tolist() == pytest.approx(expected, abs=6e-5)


def test_exact_contexts_lower_the_loss_and_prove_nothing() -> None:
    """The setting that ruins the samples (test_multistage.py) has the best loss of all."""
    exact, noisy = (expected_losses(field(tau), field(tau), "all") for tau in (0.0, 0.3))
    assert exact.tolist() == pytest.approx([0.0527, 0.2136, 0.4074], abs=6e-5)
    assert bool((exact[1:] < noisy[1:]).all())


def test_loss_of_a_network_that_outputs_zero_exactly() -> None:
    """Catches targets of the wrong scale before any training; the sum over rows is the expectation."""
    oracle = field(0.3)
    targets = oracle.points(oracle.source_root, 0.5).targets
    losses = stage_losses([torch.zeros_like(d) for d in targets], targets).sum(0)
    assert losses.tolist() == pytest.approx(ZERO_LOSSES, abs=6e-5)


def test_loss_of_a_network_that_outputs_zero_on_random_batches() -> None:
    """The same in float32, with random latents, noise and one time per image and stage, as training draws them."""
    oracle, batch = field(0.3), 200_000
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(batch, oracle.num_sources, generator=generator)
    points = oracle.points(white @ oracle.source_root.float(), torch.rand(batch, 3, generator=generator))
    losses = stage_losses([torch.zeros_like(d) for d in points.targets], points.targets)
    assert losses.shape == (batch, 3)
    assert losses.dtype == torch.float32
    sampling_error = losses.std(0) / batch**0.5
    assert bool(((losses.mean(0) - torch.tensor(ZERO_LOSSES)).abs() < 4 * sampling_error + 6e-5).all())


def test_per_sample_losses_are_means_over_elements() -> None:
    velocities = [torch.full((2, 3, n, n), 2.0) for n in (1, 2)]
    targets = [torch.zeros(2, 3, n, n) for n in (1, 2)]
    targets[1][1] = 5.0
    assert stage_losses(velocities, targets).tolist() == [[4.0, 4.0], [4.0, 9.0]]


def test_half_precision_velocities_are_compared_in_float32() -> None:
    """|1 - 1.01|^2 is 1e-4; bfloat16 has no number between 1 and 1.0078, so a cast target would lose it."""
    losses = stage_losses([torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)], [torch.full((1, 1, 2, 2), 1.01)])
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(1e-4, rel=1e-3)


def test_a_missing_stage_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        stage_losses([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)] * 2)


def test_stage_weights() -> None:
    per_stage = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    assert multistage_loss(per_stage, (0.5, 0.5)).item() == pytest.approx(11.0)
    assert multistage_loss(per_stage, (1.0, 0.0)).item() == pytest.approx(2.0)
