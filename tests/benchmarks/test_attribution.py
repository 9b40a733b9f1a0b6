"""benchmarks/attribution.py: the given stages are those of training, and its rows keep the two spreads apart."""

import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import attribution

from ecar_dist.flow.pyramid import latent_pyramid
from ecar_dist.flow.schedule import StageSchedule


def test_the_last_given_stage_is_the_image_and_the_others_have_the_noise_of_their_ends():
    schedule = StageSchedule((1 / 3, 2 / 3, 1.0))
    latents = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    ends = attribution.real_ends(schedule, latents, seed=1)
    assert torch.equal(ends[-1], latents)
    for end, level, stage in zip(ends, latent_pyramid(latents, 3), schedule.ends, strict=True):
        assert (end - stage * level).std().item() == pytest.approx(1 - stage, abs=0.02)
    assert torch.equal(attribution.real_ends(schedule, latents, seed=1)[0], ends[0])
    assert not torch.equal(attribution.real_ends(schedule, latents, seed=2)[0], ends[0])


def test_a_row_for_each_number_of_given_stages_with_both_spreads():
    def training(offset):
        return [
            [{"FD": (0.0, 100.0 - 10 * given + offset + seed), "accuracy": given / 4} for seed in range(3)]
            for given in range(4)
        ]

    rows = attribution.rows_of("ecar", [training(0.0), training(8.0)])
    assert [row["given"] for row in rows] == [0, 1, 2, 3]
    assert [row["FD"] for row in rows] == [105.0, 95.0, 85.0, 75.0]
    assert {row["sd over trainings"] for row in rows} == {statistics.stdev([0.0, 8.0])}
    assert {row["sd over samplings"] for row in rows} == {1.0}
    assert [row["accuracy"] for row in rows] == [0.0, 0.25, 0.5, 0.75]
