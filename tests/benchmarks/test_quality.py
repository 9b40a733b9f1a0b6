"""What makes benchmarks/quality.py a fair comparison; its trainings take an hour and are not run here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality
from digits import cost

from ecar_dist.kinds.table import KINDS


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_all_kinds_have_as_many_parameters_and_training_macs(tmp_path, share):
    assert {one.run(name, 0).load(tmp_path).model.kind for name, one in quality.KINDS.items()} == set(KINDS)
    runs = quality.runs_at_equal_compute(tmp_path, 2, share, list(quality.KINDS))
    assert [run.name for run in runs] == [f"{kind}-{seed}" for seed in (0, 1) for kind in quality.KINDS]
    costs = {run.variant: cost(run.load(tmp_path), quality.Draw(0)) for run in runs}
    ecar = costs.pop("ecar")
    assert ecar["samples_seen"] == 76_800 * share
    for kind, one in costs.items():
        assert one["training_macs"] == pytest.approx(ecar["training_macs"], rel=2e-3), kind
        assert one["parameters"] == pytest.approx(ecar["parameters"], rel=0.04), kind
        assert one["samples_seen"] != ecar["samples_seen"]  # the cost of a sample differs
    assert {run.load(tmp_path).run.seed for run in runs} == {0, 1}
    assert {tuple(run.load(tmp_path).ema.half_life_samples) for run in runs} == {(10_000 * share,)}


def test_the_guidance_is_the_best_over_all_seeds():
    def found(*distances):
        return [{"FD-digits": distance} for distance in distances]

    assert quality.best_guidance([found(9, 3, 5, 9, 9), found(9, 8, 5, 9, 9)]) == quality.GUIDANCE[2]


def test_what_is_reported_was_not_chosen_on(tmp_path, monkeypatch):
    """The seed of the samples that choose the guidance is not that of the samples that are scored."""
    asked = []

    def scores(work, run, draws):
        asked.extend((run.variant, draw.seed, draw.changes["guidance_scale"]) for draw in draws)
        far = [abs(draw.changes["guidance_scale"] - 1.6) for draw in draws]
        return [dict.fromkeys(quality.SCORES, distance) | {"band variance ratio": {}} for distance in far]

    monkeypatch.setattr(quality, "measure", scores)
    monkeypatch.setattr(quality, "train", lambda work, run: None)
    monkeypatch.setattr(quality, "side_by_side", lambda action, items, jobs, what: [action(*item) for item in items])
    monkeypatch.setattr(quality, "speeds", lambda work, rows: [{} for _ in rows])
    monkeypatch.setattr(quality, "summary", lambda scores, scale: {"guidance_scale": scale})
    result = quality.compare(tmp_path, quality.runs_at_equal_compute(tmp_path, 1, 0.01), 1, 2)
    assert {kind: len(rows) for kind, rows in result["kinds"].items()} == dict.fromkeys(quality.CLAIMED, 2)
    assert {(seed, scale) for _, seed, scale in asked if seed == quality.CHOOSING} == {
        (quality.CHOOSING, scale) for scale in quality.GUIDANCE
    }
    assert {(seed, scale) for _, seed, scale in asked if seed != quality.CHOOSING} == {
        (seed, 1.6) for seed in quality.SCORING
    }
    assert quality.CHOOSING not in quality.SCORING
    assert {row["guidance_scale"] for rows in result["kinds"].values() for row in rows} == {1.6}


def test_scores_of_one_training_are_means_over_samples_and_tell_each_distance():
    def score(distance):
        return dict.fromkeys(quality.SCORES, distance) | {"band variance ratio": {"4px": distance / 2}, "loss": 0.5}

    mean = quality.mean_over_samples([score(12.0), score(13.0), score(17.0)])
    assert mean["FD-digits"] == mean["class accuracy"] == 14.0
    assert mean["band variance ratio"] == {"4px": 7.0}
    assert mean[quality.OF_SAMPLES] == [12.0, 13.0, 17.0]
    assert mean["loss"] == 0.5
