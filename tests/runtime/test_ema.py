import numpy as np
import pytest
import torch

from ecar_dist.averaging import profile
from ecar_dist.config.knobs_training import EmaSection
from ecar_dist.runtime.ema import ShardedEma, tracked_decays

SECTION = EmaSection(half_life_samples=(100, 400), rampup=1.0, sigma_rel=(0.1,))
STEPS, BATCH = 60, 16


@pytest.fixture(scope="module")
def run():
    """(averages after STEPS steps of two partitions, the partitions after every step, float64)."""
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(shape, generator=generator) for shape in (5, 3)]
    ema = ShardedEma(masters, SECTION)
    trajectory = [torch.cat(masters).double().numpy()]
    for step in range(1, STEPS + 1):
        for master in masters:
            master.add_(torch.randn(master.shape, generator=generator))
        ema.update(step * BATCH, BATCH)
        trajectory.append(torch.cat(masters).double().numpy())
    return ema, np.array(trajectory)


def test_the_averages_are_the_half_lives_in_order_and_then_the_power_functions():
    decays = tracked_decays(SECTION)
    assert list(decays) == ["ema", "ema1", "ema2"]
    at = (800, BATCH)
    assert [float(decay(*at)) for decay in decays.values()] == pytest.approx(
        [0.5 ** (16 / 100), 0.5 ** (16 / 400), (1 - 16 / 800) ** (6.937204 + 1)], rel=1e-6
    )


def test_one_half_life_is_one_average():
    assert list(ShardedEma([torch.zeros(2)], EmaSection(half_life_samples=7)).by_kind) == ["ema"]


@pytest.mark.parametrize("kind", ["ema", "ema1", "ema2"])
def test_an_average_is_its_profile_times_the_weights(run, kind):
    ema, trajectory = run
    expected = profile(tracked_decays(SECTION)[kind], STEPS, BATCH) @ trajectory
    assert torch.cat(ema.by_kind[kind]).numpy() == pytest.approx(expected, abs=1e-6)


def test_averages_are_fp32_and_their_own(run):
    ema, _ = run
    flats = [flat for average in ema.by_kind.values() for flat in average]
    assert {flat.dtype for flat in flats} == {torch.float32}
    assert len({flat.data_ptr() for flat in flats}) == 6
    assert ema.partitions is ema.by_kind["ema"]
