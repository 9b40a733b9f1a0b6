"""The arithmetic of docs/claim.md, from the MACs of the plan."""

import pytest

from ecar_dist.config.read import load_config
from ecar_dist.flow.schedule import StageSchedule, uniform_ends
from ecar_dist.kinds.flops import dit_macs, velocity_macs
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.kinds.table import kind_of

DIT = dit_macs(256, 1152, 28)
CALLS = {250: 29.7, 50: 5.93, 32: 3.80, 25: 2.97, 16: 1.90, 10: 1.19, 4: 0.47, 1: 0.12}
RATIOS = {250: 11.6, 50: 2.32, 32: 1.48, 25: 1.16, 16: 0.74, 10: 0.46, 4: 0.19, 1: 0.05}


def macs(*overrides):
    config = load_config("configs/imagenet256_xl.yaml", ["sample.guidance_scale=1", *overrides])
    return kind_of(config).sampling_macs(config)


@pytest.mark.parametrize("calls", CALLS)
def test_the_table_of_calls(calls):
    assert calls * DIT / 1e12 == pytest.approx(CALLS[calls], abs=0.006 if calls < 250 else 0.06)
    assert calls * DIT / macs() == pytest.approx(RATIOS[calls], abs=0.006 if calls < 250 else 0.06)


def test_the_two_factors():
    assert macs() / 1e12 == pytest.approx(2.56, abs=0.005)
    schedule = StageSchedule(uniform_ends(3))
    assert 16 / (schedule.ends[-1] - schedule.starts[-1]) == 32
    assert pytest.approx(7.8, abs=0.05) == 250 / 32
    assert (250 / 32) * (32 * DIT / macs()) == pytest.approx(11.6, abs=0.05)
    assert macs() / DIT == pytest.approx(21.6, abs=0.05)


def test_what_stages_save_at_equal_step_size():
    shares = [
        velocity_macs(PRESETS["XL"], tokens, 16) / velocity_macs(PRESETS["XL"], 256, 16) for tokens in (16, 64, 256)
    ]
    assert shares == pytest.approx([0.0622, 0.2448, 1.0], abs=5e-5)
    schedule = StageSchedule(uniform_ends(3))
    windows = [end - start for start, end in zip(schedule.starts, schedule.ends, strict=True)]
    assert windows == pytest.approx([1 / 3, 7 / 15, 1 / 2])
    cost = sum(share * window for share, window in zip(shares, windows, strict=True))
    assert cost == pytest.approx(0.635, abs=5e-4)
    assert 1 / cost == pytest.approx(1.57, abs=0.006)
    assert sum(shares) == pytest.approx(1.31, abs=0.005)


def test_the_row_of_mar():
    steps = ["model.kind=mar", "flow.num_stages=1", "sample.solver=euler", "sample.steps_per_stage=100"]
    assert macs(*steps) / 1e12 == pytest.approx(13.2, abs=0.05)
    assert macs(*steps) / macs() == pytest.approx(5.1, abs=0.05)
