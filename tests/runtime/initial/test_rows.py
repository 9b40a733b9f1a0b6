"""Which rows of a table come from where."""

import pytest
import torch

from ecar_dist.runtime.initial.rows import pair_stages, plan_classes, plan_positions, plan_stages


def table(rows, width=4):
    return torch.arange(rows * width, dtype=torch.float32).view(rows, width)


def test_classes_are_matched_by_name_and_the_null_label_is_kept():
    old = table(4)
    plan = plan_classes(3, 2, ["cat", "dog", "eel"], ["eel", "fox"])
    found = plan.convert(old)
    assert found.known.tolist() == [True, False, True]
    assert torch.equal(found.values[0], old[2])
    assert torch.equal(found.values[2], old[3])
    assert "1 of 2" in plan.note
    assert "fox" in plan.note


@pytest.mark.parametrize("names", [None, ["a", "a"]])  # unknown, or not unique
def test_classes_without_names_are_matched_by_number_if_there_are_as_many(names):
    assert torch.equal(plan_classes(2, 2, names, ["x", "y"]).convert(table(3)).values, table(3))
    assert plan_classes(3, 2, names, ["x", "y"]).convert(table(4)).known.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("old", "new", "pairs"),
    [
        ([1, 2, 4], [2, 4, 8], [0, 1, 2]),  # equal counts: by number
        ([1, 2, 4], [2, 4], [1, 2]),  # otherwise by side
        ([2, 4], [1, 2, 4, 8], [None, 0, 1, None]),
    ],
)
def test_stages_are_paired(old, new, pairs):
    assert pair_stages(old, new) == pairs
    found = plan_stages(old, new).convert(table(len(old)))
    assert found.known.tolist() == [source is not None for source in pairs]
    for k, source in enumerate(pairs):
        assert source is None or torch.equal(found.values[k], table(len(old))[source])


def test_positions_keep_their_grid_or_are_interpolated():
    old = table(1 + 4)
    assert torch.equal(plan_positions([1, 2], [1, 2]).convert(old).values, old)
    plan = plan_positions([1, 2], [2, 4])
    found = plan.convert(old)
    assert plan.resizes
    assert found.known.all()
    assert found.values.shape == (4 + 16, 4)
    assert torch.equal(found.values[:4], old[:1].expand(4, 4))  # a grid of one token
    fine = found.values[4:].view(4, 4, 4)
    assert torch.equal(fine[0, 0], old[1])  # the corners equal those of the coarse grid
    assert torch.equal(fine[3, 3], old[4])
    assert torch.allclose(fine.mean((0, 1)), old[1:].mean(0))


def test_positions_of_a_stage_that_is_gone_or_new():
    old = table(1 + 4 + 16)
    assert torch.equal(plan_positions([1, 2, 4], [2, 4]).convert(old).values, old[1:])
    found = plan_positions([2], [2, 4]).convert(table(4))
    assert found.known.tolist() == [True] * 4 + [False] * 16
