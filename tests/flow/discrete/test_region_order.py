"""PAR's order, groups and inputs, against the paper's numbers and against the rules themselves."""

import pytest

from ecar_dist.flow.discrete.region_order import (
    GROUPS,
    check_group,
    group_sizes,
    inverse_order,
    region_order,
    slot_sources,
)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("side", [8, 16, 24])
def test_the_order_visits_each_place_once_and_its_inverse_restores_the_grid(side, group):
    order = region_order(side, group)
    assert sorted(order) == list(range(side**2))
    drawn = [f"token of place {place}" for place in order]
    assert [drawn[position] for position in inverse_order(order)] == [f"token of place {p}" for p in range(side**2)]


def test_one_region_is_raster_order():
    assert region_order(5, 1) == tuple(range(25))


def test_the_order_of_the_paper():
    places = [divmod(place, 24) for place in region_order(24, 4)]
    assert places[:6] == [(0, 0), (0, 12), (12, 0), (12, 12), (0, 1), (0, 13)]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_one_place_of_each_region_and_the_same_one(group):
    side, across = 16, {1: 1, 4: 2, 16: 4}[group]
    region = side // across
    order = region_order(side, group)
    for start in range(0, side**2, group):
        places = [divmod(place, side) for place in order[start : start + group]]
        assert len({(row % region, column % region) for row, column in places}) == 1
        assert len({(row // region, column // region) for row, column in places}) == group


@pytest.mark.parametrize(("group", "steps"), [(1, 576), (4, 147), (16, 51)])
def test_the_number_of_steps_is_that_of_the_paper(group, steps):
    sizes = group_sizes(576, group)
    assert len(sizes) == steps == group + (576 - group) // group
    assert sum(sizes) == 576
    assert set(sizes[:group]) == {1}
    assert set(sizes[group:]) == {group}


@pytest.mark.parametrize("group", GROUPS)
def test_a_slot_is_fed_nothing_of_its_own_group_or_a_later_one(group):
    sources = slot_sources(64, group)
    ends = [sum(group_sizes(64, group)[: step + 1]) for step in range(len(group_sizes(64, group)))]
    assert len(sources) == 64
    start = 0
    for end in ends:
        assert all(source < group + start for source in sources[start:end])
        start = end
    # The class and each marker once, each token that has a successor once.
    assert sorted(sources) == sorted({*sources})
    assert set(range(group)) < set(sources)


def test_the_inputs_of_plain_ar_are_the_tokens_before():
    assert slot_sources(6, 1) == (0, 1, 2, 3, 4, 5)


def test_the_inputs_of_par_are_those_of_the_paper():
    """cls x0 x1 x2 x3 M1 M2 M3 x4 x5 ...; the table is cls, M1, M2, M3, x0, ..."""
    assert slot_sources(16, 4) == (0, 4, 5, 6, 7, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15)


@pytest.mark.parametrize(("side", "group"), [(6, 16), (5, 4), (2, 4), (1, 1)])
def test_a_grid_that_cannot_be_cut_is_refused(side, group):
    with pytest.raises(ValueError, match=f"par.group={group} .*{side} x {side}"):
        check_group(side, group)


def test_grids_that_can_be_cut():
    for side, group in ((24, 16), (8, 4), (2, 1)):
        check_group(side, group)
