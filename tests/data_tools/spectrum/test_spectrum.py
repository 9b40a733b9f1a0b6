"""The eigenvalues of planted Gaussian data, and the forecast of calls against the production sampler."""

import numpy as np
import pytest
import torch

from data_tools.cli import main
from data_tools.inspection import stats
from data_tools.spectrum import report
from data_tools.spectrum.calls import forecast, stage_gain, variance_error
from data_tools.spectrum.eigenvalues import Spectrum, centred, halve, level_variances
from ecar_dist.errors import DataError
from ecar_dist.flow.multistage import sample_stages
from ecar_dist.flow.schedule import GAMMA_EXTREME, StageSchedule, uniform_ends
from ecar_dist.flow.solvers import SOLVERS
from tests.flow.oracle import GaussianOracle, basis_draws, begin_stages


@pytest.mark.parametrize(("eigenvalue", "calls"), [(0.1, 6), (1, 2), (10, 6), (30, 10), (100, 18), (300, 30)])
def test_calls_of_one_stage(eigenvalue, calls):
    """The exact values from an independent derivation."""
    found = forecast([np.array([float(eigenvalue)])])
    assert (found.calls, found.cost) == (calls, calls)
    assert found.error <= 0.05


def haar_basis(side):
    """Orthonormal rows [side^2, side^2], coarse to fine, and the level of each row, for three levels."""
    unit = np.eye(side * side).reshape(-1, 1, side, side)
    low, finest = halve(unit)
    low, middle = halve(low)
    rows = [part.reshape(side * side, -1).T for part in (low, middle, finest)]
    return np.concatenate(rows), np.repeat([0, 1, 2], [len(part) for part in rows])


def test_the_chain_of_stages_is_the_production_sampler():
    """Data that are independent in the Haar basis, for which the forecast is exact, sampled without Monte Carlo."""
    schedule = StageSchedule(uniform_ends(3), GAMMA_EXTREME)
    basis, level = haar_basis(8)
    np.testing.assert_allclose(basis @ basis.T, np.eye(64), atol=1e-12)
    variance = np.exp(np.random.default_rng(0).normal(size=64)) * np.array([40.0, 5.0, 0.5])[level]
    covariance = torch.from_numpy(basis.T @ np.diag(variance) @ basis)
    oracle = GaussianOracle(schedule, covariance, torch.zeros(64, dtype=torch.float64), tau=0.0)
    drawn = sample_stages(
        schedule,
        begin_stages(oracle, "none"),
        basis_draws(schedule, 8),
        tau=None,
        solver=SOLVERS["midpoint"],
        steps_per_stage=(1, 2, 3),
        time_shift=2.0,
    )[-1]
    matrix = drawn.flatten(1).numpy()  # random numbers to pixels
    sampled = np.diag(basis @ matrix.T @ matrix @ basis.T)

    variances = [variance[level == j] for j in range(3)]
    gains = [
        [
            stage_gain(schedule, stage, j, variances[j] / 4.0 ** (2 - stage), steps, 2.0, "midpoint")
            for j in range(stage + 1)
        ]
        for stage, steps in enumerate((1, 2, 3))
    ]
    assert variance_error(schedule, variances, gains) == pytest.approx(np.abs(sampled / variance - 1).max(), rel=1e-6)


def test_stages_are_cheaper_where_the_large_eigenvalues_are_coarse():
    coarse = forecast([np.array([400.0]), np.array([4.0]), np.array([1.0])])
    assert coarse.cost < forecast([np.array([400.0, 4.0, 1.0])]).cost / 2
    fine = forecast([np.array([1.0]), np.array([4.0]), np.array([400.0])])
    assert fine.cost > 1.5 * coarse.cost


def test_nothing_is_promised_beyond_the_steps_that_were_tried():
    assert forecast([np.array([1e9])]) is None


def planted(count):
    """Fields [count, 3, 8, 8]: unit noise, 100 in one direction, 400 in the mean of all values; two distant classes."""
    generator = np.random.default_rng(1)
    labels = np.arange(count) % 2
    direction = np.zeros((3, 8, 8))
    direction[1, ::2, ::4] = 0.25
    direction[1, ::2, 2::4] = -0.25  # no contribution to the mean
    fields = generator.normal(size=(count, 3, 8, 8))
    fields += generator.normal(size=(count, 1, 1, 1)) * 399**0.5 / 192**0.5
    fields += generator.normal(size=(count, 1, 1, 1)) * 99**0.5 * direction
    fields[:, 0, :4] += 8 * (labels - 0.5)[:, None, None]  # adds 32 x 16 to one direction
    return fields.astype(np.float32), labels


def test_planted_eigenvalues_are_found_overall_and_within_a_class():
    fields, labels = planted(3000)
    overall = Spectrum.of(*centred(fields)).values
    within = Spectrum.of(*centred(fields, labels)).values
    assert len(within) == 192
    assert overall[0] > 600
    np.testing.assert_allclose(within[:2], [400, 100], rtol=0.08)
    assert within[2] < 2
    assert within.sum() == pytest.approx(np.square(centred(fields, labels)[0]).sum() / 2998, rel=1e-4)


def test_fewer_samples_than_values_give_the_same_eigenvalues():
    fields = np.random.default_rng(2).normal(size=(20, 3, 4, 4)).astype(np.float32)
    flat = fields.reshape(20, -1)
    expected = np.linalg.eigvalsh(flat.T @ flat / 19)[::-1][:20]
    np.testing.assert_allclose(Spectrum.of(fields, 19).values, expected, rtol=1e-4)


def test_dimensions_that_hold_the_variance():
    assert Spectrum(np.array([90.0, 4.0, 2.0, 2.0, 2.0])).dimensions == 3
    assert Spectrum(np.array([96.0, 4.0])).main.tolist() == [96.0]


def test_halving_is_orthonormal_and_keeps_the_means():
    fields = np.random.default_rng(3).normal(size=(2, 3, 4, 4))
    low, details = halve(fields)
    np.testing.assert_allclose(low, 2 * fields.reshape(2, 3, 2, 2, 2, 2).mean(axis=(3, 5)))
    np.testing.assert_allclose((low**2).sum() + (details**2).sum(), (fields**2).sum())


def test_levels_of_fields_that_were_halved_before():
    fields, labels = planted(500)
    within, freedom = centred(fields, labels)
    whole = level_variances(within, freedom, 3, 0, 0.0)
    assert [len(values) for values in whole] == [12, 36, 144]
    halved = level_variances(halve(within)[0], freedom, 3, 1, 0.0)
    np.testing.assert_allclose(halved[0], whole[0], rtol=1e-4)
    np.testing.assert_allclose(halved[1], whole[1], rtol=1e-4)
    assert len(halved[2]) == 0
    assert all(values.min() >= 3 for values in level_variances(within, freedom, 2, 0, 3.0) if len(values))


@pytest.fixture
def latents(tmp_path, capsys):
    """A folder of finished shards of planted latents, normalised by twice their raw values."""
    fields, labels = planted(600)
    np.save(tmp_path / "raw.npy", fields / 2)
    np.save(tmp_path / "labels.npy", labels)
    words = ["import", str(tmp_path / "raw.npy"), str(tmp_path / "out"), "--vae", "identity-f1"]
    assert main([*words, "--labels", str(tmp_path / "labels.npy")]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_the_command_prints_what_training_sees(latents, capsys):
    assert main(["stats", "--spectrum", str(latents)]) == 0
    lines = capsys.readouterr().out.splitlines()
    within = next(line for line in lines if "within a class" in line)
    largest = [float(word) for word in within.split("class")[1].split("...")[0].split()]
    assert largest[:2] == pytest.approx([400, 100], rel=0.15)
    calls = [line.split(" calls, ")[0].split() for line in lines if " calls, " in line]
    assert len(calls) == 9
    assert calls[0][:2] == ["1", "stage,"]
    assert int(calls[0][-1]) == pytest.approx(1.8 * largest[0] ** 0.5, rel=0.2)
    assert lines[-1].startswith("cheapest: ")


def test_large_latents_are_halved_and_the_report_says_so(latents, capsys, monkeypatch):
    monkeypatch.setattr(report, "MAX_VALUES", 50)
    stats(latents, spectrum=True)
    printed = capsys.readouterr().out
    assert "block means, 4 x 4" in printed
    within = printed.split("within a class")[1].split()
    assert float(within[0]) == pytest.approx(400, rel=0.15)


def test_one_sample_a_class_has_no_spectrum(latents, monkeypatch):
    monkeypatch.setattr(report, "MAX_SAMPLES", 2)
    monkeypatch.setattr(report, "read_latents", lambda *_: (np.zeros((2, 3, 8, 8), np.float32), np.arange(2)))
    with pytest.raises(DataError, match="more samples than classes"):
        stats(latents, spectrum=True)
