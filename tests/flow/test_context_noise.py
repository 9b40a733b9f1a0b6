"""The cost of a small tau: the arithmetic of `flow/context_noise.py` against the production sampler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ecar_dist.flow.context_noise import SMALLEST_TAU, kept_variance, steps_to_keep
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from tests.flow.oracle import GaussianOracle, begin_stages, sampled_covariance
from tests.flow.test_multistage import TRUTH, covariance, field, mean_variance_ratio

THREE = StageSchedule(uniform_ends(3))
VARIANCE = float(TRUTH.sum()) / TRUTH.numel()  # of the field's mean; its coarsest stage is one pixel


@pytest.mark.parametrize(
    ("tau", "share"), [(0.0, 0.0751), (1e-9, 0.0751), (0.01, 0.2347), (0.03, 0.7579), (0.1, 0.9935), (0.3, 0.9996)]
)
def test_what_eight_midpoint_steps_keep(tau: float, share: float) -> None:
    """With the production sampler under optimal velocities."""
    assert mean_variance_ratio(covariance(field(tau), "all", "midpoint", 8)) == pytest.approx(share, abs=6e-5)


def on_a_torus() -> torch.Tensor:
    """exp(-distance / 1.5) on a 4 x 4 field without edges, where the mean of the field is an eigenvector."""
    axis = torch.arange(4, dtype=torch.float64)
    apart = (axis[:, None] - axis[None, :]).abs()
    squared = torch.minimum(apart, 4 - apart).square()
    distance = (squared[:, None, :, None] + squared[None, :, None, :]).sqrt().reshape(16, 16)
    return torch.exp(-distance / 1.5)


@pytest.mark.parametrize(("tau", "gamma"), [(0.01, -1 / 3), (0.1, -1 / 3), (0.3, -1 / 3), (0.05, -0.2)])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (16, 1.0), (4, 3.0)])
def test_the_arithmetic_is_that_of_the_sampler(tau: float, gamma: float, steps: int, shift: float) -> None:
    schedule, truth = StageSchedule(uniform_ends(3), gamma), on_a_torus()
    oracle = GaussianOracle(schedule, truth, torch.zeros(16, dtype=torch.float64), tau)
    stages = begin_stages(oracle, "all")
    sampled = sampled_covariance(schedule, stages, 4, tau=tau, solver="midpoint", steps=steps, time_shift=shift)
    variance = float(truth.sum()) / truth.numel()
    kept = kept_variance(schedule, tau, [steps] * schedule.num_stages, variance=variance, time_shift=shift)
    assert kept == pytest.approx(float(sampled.sum() / truth.sum()), abs=1e-9)


@pytest.mark.parametrize(("tau", "steps"), [(0.01, 43), (0.03, 15), (0.1, 5), (0.3, 2)])
def test_the_fewest_steps_that_keep_95_percent(tau: float, steps: int) -> None:
    assert steps_to_keep(THREE, tau, 0.95, variance=VARIANCE) == steps
    kept = [mean_variance_ratio(covariance(field(tau), "all", "midpoint", number)) for number in (steps - 1, steps)]
    assert kept[0] < 0.95 <= kept[1]


TABLE = {  # docs/ecar.md, section 5: tau, share kept by 8, 16 and 64 steps, steps for 95 % here and at unit variance
    1.0: (1.000, 1.000, 1.000, 1, 2),
    0.3: (1.000, 1.000, 1.000, 2, 3),
    0.1: (0.993, 0.999, 1.000, 5, 7),
    0.03: (0.758, 0.966, 1.000, 15, 23),
    0.01: (0.235, 0.537, 0.987, 43, 67),
    0.001: (0.077, 0.082, 0.185, 427, 665),
}


@pytest.mark.parametrize("tau", TABLE)
def test_the_table_of_the_docs(tau: float) -> None:
    *shares, here, unit = TABLE[tau]
    kept = [kept_variance(THREE, tau, [steps] * 3, variance=VARIANCE) for steps in (8, 16, 64)]
    assert kept == pytest.approx(shares, abs=6e-4)
    assert steps_to_keep(THREE, tau, 0.95, variance=VARIANCE) == here
    assert steps_to_keep(THREE, tau, 0.95, variance=1.0) == unit


def test_steps_grow_as_tau_falls() -> None:
    steps = [steps_to_keep(THREE, tau, 0.95, variance=1.0) for tau in (0.1, 0.01, 0.001)]
    assert steps == [7, 67, 665]
    assert steps_to_keep(THREE, 1e-9, 0.95, variance=1.0) is None


def test_the_bound_is_where_the_default_steps_still_suffice() -> None:
    for variance in (0.1, 1.0, 10.0, 64.0):
        assert kept_variance(THREE, SMALLEST_TAU, [8] * 3, variance=variance) > 0.93
    assert kept_variance(THREE, SMALLEST_TAU / 2, [8] * 3, variance=1.0) < 0.85


@pytest.mark.parametrize("stages", [2, 4])
def test_one_stage_needs_no_context_and_more_stages_need_one_each(stages: int) -> None:
    assert kept_variance(StageSchedule((1.0,)), 0.0, [8], variance=1.0) == pytest.approx(1.0, abs=2e-3)
    few, many = (
        kept_variance(StageSchedule(uniform_ends(stages)), 0.01, [steps] * stages, variance=1.0) for steps in (8, 512)
    )
    assert few < 0.6
    assert many == pytest.approx(1.0, abs=2e-3)


def test_it_needs_no_torch() -> None:
    code = "import sys, ecar_dist.flow.context_noise; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
