import math
from functools import partial

import numpy as np
import pytest

from ecar_dist import averaging
from ecar_dist.averaging import (
    fit,
    gamma_to_sigma_rel,
    half_life_decay,
    power_decay,
    profile,
    sigma_rel_to_gamma,
)

BATCH = 16


def half_life(samples, rampup=0.5):
    return partial(half_life_decay, samples, rampup)


def power(sigma_rel):
    return partial(power_decay, sigma_rel_to_gamma(sigma_rel))


def track(decay, trajectory):
    """The average after every step, by the update rule; `trajectory` [steps + 1, weights] begins with the start."""
    averages = [trajectory[0]]
    for step, weights in enumerate(trajectory[1:], start=1):
        beta = decay(step * BATCH, BATCH)
        averages.append(beta * averages[-1] + (1 - beta) * weights)
    return np.array(averages)


def random_walk(steps, weights=50):
    return np.random.default_rng(0).normal(size=(steps + 1, weights)).cumsum(axis=0)


def test_half_of_a_weight_is_left_after_a_half_life():
    decay = half_life_decay(1000, 0.1, samples_seen=10**9, batch=10)
    assert decay**100 == pytest.approx(0.5, abs=1e-12)


def test_the_half_life_ramps_up_with_samples_seen():
    early = half_life_decay(10**6, 0.1, samples_seen=100, batch=10)
    assert early == pytest.approx(0.5, abs=1e-12)  # half-life 10 samples = one batch
    assert early < half_life_decay(10**6, 0.1, 1000, 10) < half_life_decay(10**6, 0.1, 10**8, 10)


def test_batch_size_does_not_matter_in_the_long_run():
    assert half_life_decay(10**4, 1.0, 10**6, 16) ** 4 == pytest.approx(half_life_decay(10**4, 1.0, 10**6, 64))


def test_a_power_function_forgets_the_random_start_at_once():
    assert power_decay(6.94, BATCH, BATCH) == 0
    assert profile(power(0.1), 100, BATCH)[0] < 1e-300


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])  # EDM2's own pairs
def test_published_widths_and_exponents(sigma_rel, gamma):
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, abs=5e-5)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.03, 0.1, 0.2, 0.279])
def test_width_and_exponent_are_inverses(sigma_rel):
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_profile_has_the_width_it_is_named_by(sigma_rel):
    steps = 4000
    weights, time = profile(power(sigma_rel), steps, BATCH), np.arange(steps + 1) / steps
    mean = (weights * time).sum()
    assert math.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("decay", [half_life(300), half_life(10**9, 0.05), half_life(300, 1e-4), power(0.1)])
def test_a_profile_is_what_the_updates_do(decay):
    """Also with decays that are exactly 0: a half-life of 1e-4 x samples_seen forgets all, and so underflows."""
    trajectory = random_walk(200)
    tracked = track(decay, trajectory)
    for steps in (1, 2, 77, 200):
        weights = profile(decay, steps, BATCH)
        assert weights.shape == (steps + 1,)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert weights @ trajectory[: steps + 1] == pytest.approx(tracked[steps], abs=1e-10)


def test_a_half_life_under_its_ramp_up_is_a_power_function():
    rampup = 0.1
    ours = profile(half_life(1e18, rampup), 5000, BATCH)
    theirs = profile(partial(power_decay, math.log(2) / rampup - 1), 5000, BATCH)
    assert np.abs(ours - theirs).max() < 1e-2 * theirs.max()


STEPS = 1000
TRACKED = {"ema": half_life(1000), "ema1": half_life(4000)}


def reconstruct(every, target, tracked=TRACKED):
    """The fit from snapshots of both averages, and its relative error against the average itself, on random walks."""
    trajectory = random_walk(STEPS)
    averages = {name: track(decay, trajectory) for name, decay in tracked.items()}
    snapshots = [(step, name) for step in range(every, STEPS + 1, every) for name in tracked]
    result = fit(snapshots, tracked, target, STEPS, BATCH)
    made = sum(coefficient * averages[name][step] for (step, name), coefficient in result.coefficients.items())
    truth = track(target, trajectory)[STEPS]
    return result, np.linalg.norm(made - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("samples", [1500, 2000, 8000])
def test_a_half_life_that_nobody_kept(samples):
    """From two others at 20 steps. Measured residuals are 2e-3, and errors 2e-5."""
    result, seen = reconstruct(STEPS // 20, half_life(samples))
    assert result.residual < 4e-3
    assert seen < 1e-4
    assert sum(result.coefficients.values()) == pytest.approx(1, abs=1e-12)


def test_a_power_function_between_two_kept_ones():
    tracked = {"ema": power(0.05), "ema1": power(0.1)}
    result, seen = reconstruct(STEPS // 20, power(0.075), tracked)
    assert result.residual < 4e-3
    assert seen < 1e-4


def test_too_few_snapshots_show_in_the_residual():
    one, few, many = (reconstruct(every, half_life(500))[0].residual for every in (STEPS, STEPS // 4, STEPS // 50))
    assert one > 0.2
    assert one > few > 0.1 > many


def test_an_average_that_was_kept_is_taken_as_it_is():
    result, seen = reconstruct(STEPS // 4, TRACKED["ema1"])
    assert result.residual < 1e-12
    assert seen < 1e-12
    assert result.coefficients[STEPS, "ema1"] == pytest.approx(1)


def test_one_snapshot_stands_for_itself():
    result = fit([(STEPS, "ema")], TRACKED, half_life(1500), STEPS, BATCH)
    assert result.coefficients == {(STEPS, "ema"): 1.0}
    assert 0.05 < result.residual < 0.5


def test_a_target_in_the_middle_of_the_run_uses_no_later_snapshot():
    snapshots = [(step, name) for step in (250, 500, 750, 1000) for name in TRACKED]
    result = fit(snapshots, TRACKED, TRACKED["ema"], 500, BATCH)
    assert result.residual < 1e-12
    assert result.coefficients[500, "ema"] == pytest.approx(1)


def test_the_fit_does_not_depend_on_how_many_steps_are_held_at_once(monkeypatch):
    whole, _ = reconstruct(STEPS // 4, half_life(2000))
    monkeypatch.setattr(averaging, "CHUNK_STEPS", 37)
    pieces, _ = reconstruct(STEPS // 4, half_life(2000))
    assert pieces.residual == pytest.approx(whole.residual, rel=1e-9)
    assert list(pieces.coefficients.values()) == pytest.approx(list(whole.coefficients.values()), rel=1e-6, abs=1e-9)
