"""The rule of benchmarks/decisive.py on made-up rows; how its settings are chosen; the variants cost the same."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import decisive
import decisive_rule as rule
import pixels
import variants

from ecar_dist.kinds.table import kind_of


def rows(dit, ecar, *, trainings=2, se=0.1):
    """dit: calls -> (FD on the uniform grid, FD on the best one); one call is 1 MAC. ecar: MACs -> FD."""
    found = []
    for training in range(trainings):
        for calls, distances in dit.items():
            for grid, distance in zip(("uniform", "shifted"), distances, strict=True):
                found.append(one("dit", grid, training, calls, calls, distance, se))
        found += [one("ecar", "shifted", training, 6, macs, distance, se) for macs, distance in ecar.items()]
    return found


def one(kind, grid, training, calls, macs, distance, se):
    return {
        "kind": kind,
        "grid": grid,
        "training": training,
        "setting": {},
        "calls": calls,
        "macs": macs,
        "FD": distance,
        "SE": se,
        "band error": 1.0,
    }


SLOW = {2: (40.0, 30.0), 8: (20.0, 14.0), 16: (12.0, 10.0), 32: (10.2, 10.0)}


def test_cheap_stages_beside_a_slow_dit_confirm():
    verdict = rule.decide(rows(SLOW, {5: 10.1}))
    assert verdict["result"] == "confirmed"
    # dit has 12.0 at 16 calls, more than 5 % above its best on that grid.
    assert [training["calls of dit"] for training in verdict["trainings"]] == [32, 32]
    assert [training["saving"] for training in verdict["trainings"]] == [16 / 5] * 2


@pytest.mark.parametrize(
    ("dit", "ecar"),
    [
        (SLOW, {12: 10.1}),  # saves 16 / 12, less than 1.4
        (SLOW, {5: 11.0}),  # better than dit at 5 MACs, but never as good as its best
        ({2: (10.0, 10.0), 8: (9.9, 9.9)}, {1.9: 9.95, 2.1: 9.5}),  # dit needs two calls only
    ],
)
def test_less_than_that_is_undecided(dit, ecar):
    assert rule.decide(rows(dit, ecar))["result"] == "undecided"


def test_stages_that_are_nowhere_better_at_equal_macs_refute():
    verdict = rule.decide(rows(SLOW, {2: 29.9, 8: 13.8, 16: 10.1}))
    assert verdict["result"] == "refuted"
    assert verdict["trainings"][0]["better at equal MACs"] == []


def test_one_training_alone_confirms_nothing():
    mixed = [row for row in rows(SLOW, {5: 10.1}) if not (row["training"] == 1 and row["kind"] == "ecar")]
    mixed.append(one("ecar", "shifted", 1, 6, 5, 11.0, 0.1))
    assert rule.decide(mixed)["result"] == "undecided"


def test_bands_count_in_how_many_calls_dit_needs():
    changed = rows({2: (10.0, 10.0), 32: (10.0, 10.0)}, {5: 10.1})
    for row in changed:
        row["band error"] = 1.2 if row["calls"] == 2 else 1.0
    assert {training["calls of dit"] for training in rule.decide(changed)["trainings"]} == {32}


def test_a_band_that_is_too_weak_counts_as_one_that_is_too_strong():
    assert rule.band_error({"1px": 0.8, "2px": 1.1}) == pytest.approx(1.25)
    assert rule.band_error({"1px": 0.9, "2px": 1.3}) == pytest.approx(1.3)


def test_each_number_of_steps_gets_its_own_shift(monkeypatch):
    """The guidance and the shifts with the least mean distance to the first half, over trainings."""

    def pretend(action, items, jobs, what):
        return [[{"FD": [distance(draw.changes) + run.seed, 0.0]} for draw in draws] for _, run, draws, _ in items]

    def distance(setting):
        steps = max(setting["steps_per_stage"])
        best_shift = {2: 2.0, 8: 3.0}.get(steps, 1.0)
        return abs(setting["guidance_scale"] - 1.7) + abs(setting.get("time_shift", 1.0) - best_shift)

    monkeypatch.setattr(pixels, "side_by_side", pretend)
    runs = [pixels.PixelRun("ecar", seed, pixels.CONFIG) for seed in (0, 1)]
    steps = [{"steps_per_stage": [n, n, n]} for n in (1, 2, 8)]
    chosen = pixels.choose(Path(), runs, {"ecar": steps[1]}, {"ecar": steps}, 10, 1)
    assert chosen["ecar"]["guidance"]["guidance_scale"] == 1.7
    assert chosen["ecar"]["shifts"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("group", variants.GROUPS)
def test_every_variant_is_trained_for_the_same_compute(group, monkeypatch, tmp_path):
    """Including the run that it starts from."""
    monkeypatch.setattr(pixels, "load_manifest", lambda _: SimpleNamespace(num_classes=17))
    costs = []
    for name, variant in variants.GROUPS[group]().items():
        run = pixels.at_compute(tmp_path, variant.run(name, 0, "photos"), 1e12 * variant.share)
        config = run.load(tmp_path)
        macs = kind_of(config).training_macs(config) * config.train.total_samples
        costs.append(macs + (1e12 if variant.continues else 0.0))
    assert costs == pytest.approx([costs[0]] * len(costs), rel=0.01)


def test_a_set_without_all_photographs_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(pixels, "call", lambda *_, **__: None)
    monkeypatch.setattr(pixels, "load_manifest", lambda _: SimpleNamespace(num_classes=3))
    with pytest.raises(SystemExit, match=r"3 photographs.* 17; pip install"):
        pixels.prepare(tmp_path, "photos")
    pixels.prepare(tmp_path, "emoji")
    monkeypatch.setattr(pixels, "load_manifest", lambda _: SimpleNamespace(num_classes=17))
    pixels.prepare(tmp_path, "photos")


@pytest.mark.parametrize("count", [300, 500, 20_000])
def test_samples_have_the_classes_of_the_training_set_however_it_is_sorted(count):
    labels = np.repeat(np.arange(17), 512)
    drawn = pixels.in_proportion(labels, count)
    counts = np.bincount(drawn, minlength=17)
    assert (len(drawn), counts.max() - counts.min()) == (count, 1)
    assert (drawn != np.sort(drawn)).any()
    assert np.array_equal(pixels.in_proportion(labels[::-1], count), drawn)


def test_only_a_kind_that_chose_guidance_is_scored_without_it():
    shifts = [1.0, 1.0, 3.0, 2.0, 3.0, 2.0]
    guided = {"guidance_scale": 1.7, "guidance_ramp": "constant", "guidance_interval": (0.0, 1.0)}
    assert decisive.unguided_settings("pyramid", {"guidance": {"guidance_scale": 1.0}, "shifts": shifts}) == []
    settings = [one for _, one in decisive.unguided_settings("ecar", {"guidance": guided, "shifts": shifts})]
    assert {one["guidance_scale"] for one in settings} == {1.0}
    assert [one["time_shift"] for one in settings] == shifts
