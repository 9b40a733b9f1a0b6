from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.data.order.lanes import LaneOrder, default_lanes, rank_positions, sample_indices
from ecar_dist.errors import ConfigError, DataError

WORLD_SIZES = [1, 2, 3, 5, 8, 12, 64]
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def lane_orders(draw):
    """Ragged sets: shards with one sample, none, or many; any lanes and windows."""
    counts = draw(st.lists(st.one_of(st.just(1), st.integers(0, 30)), min_size=1, max_size=12).filter(any))
    lanes = draw(st.integers(1, min(sum(counts), 24)))
    return LaneOrder(counts, draw(SEEDS), lanes, draw(st.integers(0, 5)))


def windows_of(order, epoch):
    """The windows of an epoch as lists of positions, lane after lane, computed by counting."""
    longest = -(-order.count // order.lanes)
    size = order.window_shards * max(order.counts.tolist()) or longest
    number = -(-longest // size)
    start = epoch * order.count
    for lane in range(order.lanes):
        lane_positions = range(start + lane, start + order.count, order.lanes)
        edges = [k * len(lane_positions) // number for k in range(number + 1)]
        yield from (lane_positions[a:b] for a, b in pairwise(edges))


class TestLaneOrder:
    @settings(max_examples=400, deadline=None)
    @given(order=lane_orders(), epoch=st.integers(0, 10**6), data=st.data())
    def test_every_sample_once_an_epoch_in_any_blocks(self, order, epoch, data):
        count = order.count
        begin = epoch * count + data.draw(st.integers(0, count - 1))  # a block straddles the first two epochs
        positions = np.arange(begin, (epoch + 3) * count)
        indices = order.sample_indices(positions)
        for aligned in np.split(indices, np.arange((epoch + 1) * count - begin, positions.size, count))[1:]:
            assert np.array_equal(np.sort(aligned), np.arange(count))
        block = data.draw(st.integers(1, 2 * count))
        in_blocks = [order.sample_indices(part) for part in np.split(positions, range(block, positions.size, block))]
        assert np.array_equal(np.concatenate(in_blocks), indices)

    @settings(max_examples=60, deadline=None)
    @given(order=lane_orders(), epoch=st.integers(0, 100))
    def test_locate_names_the_shard_and_the_row_of_the_dense_index(self, order, epoch):
        positions = np.arange(epoch * order.count, (epoch + 1) * order.count)[:, None]
        shards, rows = order.locate(positions)
        dense = [(shard, row) for shard, count in enumerate(order.counts) for row in range(count)]
        found = [dense[index] for index in order.sample_indices(positions).ravel()]
        assert found == list(zip(shards.ravel().tolist(), rows.ravel().tolist(), strict=True))
        assert shards.shape == rows.shape == positions.shape
        assert shards.dtype == rows.dtype == np.int64

    @settings(max_examples=120, deadline=None)
    @given(order=lane_orders(), data=st.data())
    def test_a_run_cut_and_resumed_at_other_world_sizes_sees_one_sequence(self, order, data):
        """Each leg trains some steps on some ranks, then dies. The next leg starts at the last checkpoint."""
        seen: dict[int, int] = {}
        checkpoint = 0
        for _ in range(data.draw(st.integers(1, 5))):
            world_size = data.draw(st.sampled_from(WORLD_SIZES))
            global_batch_size = world_size * data.draw(st.integers(1, 4))
            steps = data.draw(st.integers(1, 4))
            end = checkpoint + steps * global_batch_size
            for step_start in range(checkpoint, end, global_batch_size):
                parts = [rank_positions(step_start, global_batch_size, rank, world_size) for rank in range(world_size)]
                assert sorted(np.concatenate(parts)) == list(range(step_start, step_start + global_batch_size))
            for rank in range(world_size):  # like the loader: the positions of several steps at once
                positions = rank_positions(checkpoint, end - checkpoint, rank, world_size)
                for position, index in zip(positions.tolist(), order.sample_indices(positions).tolist(), strict=True):
                    assert seen.setdefault(position, index) == index
            checkpoint += data.draw(st.integers(0, steps)) * global_batch_size
        uninterrupted = order.sample_indices(np.arange(len(seen)))
        assert [seen[position] for position in range(len(seen))] == uninterrupted.tolist()

    @settings(max_examples=300, deadline=None)
    @given(order=lane_orders(), data=st.data())
    def test_upcoming_names_the_shards_of_the_windows_that_are_touched(self, order, data):
        world_size = data.draw(st.sampled_from(WORLD_SIZES))
        ranks = data.draw(st.lists(st.integers(0, world_size - 1), min_size=1, max_size=8))
        start = data.draw(st.integers(0, 3 * order.count))
        stop = start + data.draw(st.integers(0, 2 * order.count))
        upcoming = order.upcoming(start, stop, ranks, world_size)
        mine = [position for position in range(start, stop) if position % world_size in ranks]
        assert set(order.locate(np.array(mine, dtype=np.int64))[0].tolist()) <= set(upcoming)
        place = {}
        for epoch in range(start // order.count, stop // order.count + 1):
            for window in windows_of(order, epoch):
                uses = [position for position in window if position in set(mine)]
                for shard in order.locate(np.array(window, dtype=np.int64))[0].tolist() if uses else ():
                    place[shard] = min(place.get(shard, stop), uses[0])
        assert len(upcoming) == len(set(upcoming))
        assert set(upcoming) == set(place)
        assert [place[shard] for shard in upcoming] == sorted(place.values())

    def test_no_ranks_and_no_positions_need_no_shards(self):
        order = LaneOrder([5, 5], seed=0, lanes=2, window_shards=4)
        assert order.upcoming(0, 10, [], 4) == order.upcoming(7, 7, [0], 1) == []
        assert order.locate(np.arange(0))[0].shape == (0,)

    @pytest.mark.parametrize("world_size", [1, 2, 4, 8])
    def test_ranks_that_divide_the_lanes_share_no_more_shards_than_a_cut_needs(self, world_size):
        order = LaneOrder([100] * 61 + [37], seed=1, lanes=8, window_shards=4)
        read = [order.upcoming(0, order.count, [rank], world_size) for rank in range(world_size)]
        assert 62 <= sum(map(len, read)) <= 62 + world_size - 1 + (8 - world_size)
        assert set().union(*read) == set(range(62))

    def test_each_window_is_of_few_shards(self):
        order = LaneOrder([100] * 64, seed=3, lanes=4, window_shards=3)  # 16 shards per lane: windows of 16 / 6
        for window in windows_of(order, epoch=2):
            shards = order.locate(np.array(window))[0]
            assert 266 <= len(window) <= 267
            assert len(set(shards.tolist())) in (3, 4)

    def test_huge_sets_need_no_table(self):
        order = LaneOrder([10**9 + 7] * 300, seed=1, lanes=64, window_shards=4)
        last = order.count - 1
        shards, rows = order.locate(np.array([0, 1, last, order.count, 10**6 * order.count + 3]))
        assert rows.min() >= 0
        assert rows.max() < 10**9 + 7
        assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 5
        assert order.upcoming(0, order.count, [0, 1, 2, 3], 64)

    def test_different_orders_have_different_descriptions(self):
        orders = [LaneOrder([9] * 9, *rest) for rest in ((0, 2, 1), (1, 2, 1), (0, 3, 1), (0, 2, 2))]
        assert orders[0].describe() == {"name": "lanes-feistel-v1", "seed": 0, "lanes": 2, "window_shards": 1}
        assert len({str(order.describe()) for order in orders}) == 4
        epochs = [order.sample_indices(np.arange(81)).tolist() for order in orders]
        assert all(epoch != epochs[0] for epoch in epochs[1:])

    def test_the_order_is_pinned(self):
        """The order is part of every run's identity: a changed order needs a new `LaneOrder.name`."""
        order = LaneOrder([7, 1, 12, 0, 9, 5], seed=42, lanes=2, window_shards=1)
        assert order.sample_indices(np.arange(28, 40)).tolist() == PINNED_LANES
        large = LaneOrder([4096] * 300, seed=7, lanes=64, window_shards=4)
        assert large.sample_indices(np.array([0, 1, 10**6, 1_228_799, 1_228_800, 10**9])).tolist() == PINNED_LARGE

    def test_the_example_of_the_module_is_true(self):
        order = LaneOrder([2, 2, 2, 2], seed=3, lanes=2, window_shards=1)
        shards, rows = order.locate(np.arange(8))
        found = [f"{'ABCD'[shard]}{row}" for shard, row in zip(shards, rows, strict=True)]
        assert found == ["D0", "A1", "D1", "A0", "C1", "B1", "C0", "B0"]
        assert order.upcoming(0, 8, [0], 2) == [3, 2]

    @pytest.mark.parametrize(
        ("counts", "lanes", "window_shards", "error", "text"),
        [
            ([], 1, 1, DataError, "encode"),
            ([0, 0], 1, 1, DataError, "0, 0"),
            ([5, -1], 1, 1, DataError, "5, -1"),
            ([3, 2], 6, 1, ConfigError, "lanes=6 for 5 samples"),
            ([3, 2], 0, 1, ConfigError, "lanes=0"),
            ([3, 2], 1, -1, ConfigError, "window_shards=-1"),
        ],
    )
    def test_impossible_orders_are_refused(self, counts, lanes, window_shards, error, text):
        with pytest.raises(error, match=text):
            LaneOrder(counts, 0, lanes, window_shards)


class TestShuffle:
    """Statistics of fixed seeds, with bounds of four sigma and more."""

    def test_where_a_sample_lands_is_uniform(self):
        order = LaneOrder([3, 3, 3, 3], seed=3, lanes=2, window_shards=1)
        epochs = 20_000
        indices = order.sample_indices(np.arange(12 * epochs)).reshape(epochs, 12)
        table = np.array([np.bincount(column, minlength=12) for column in indices.T]).astype(float)
        statistic, freedom = ((table - epochs / 12) ** 2 / (epochs / 12)).sum(), 11 * 11
        assert statistic < freedom + 4 * np.sqrt(2 * freedom)

    def test_neighbours_and_epochs_are_uncorrelated(self):
        order = LaneOrder([128] * 1024, seed=0, lanes=16, window_shards=4)
        first, second = order.sample_indices(np.arange(2 * order.count)).reshape(2, -1).astype(float)
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(1024)  # the shards are what is drawn
        assert abs(np.corrcoef(first, np.arange(order.count))[0, 1]) < 4 / np.sqrt(1024)
        assert abs(np.corrcoef(first % 128, second % 128)[0, 1]) < 4 / np.sqrt(order.count)
        for lag in (1, 2, 16, 32):
            assert abs(np.corrcoef(first[lag:] % 128, first[:-lag] % 128)[0, 1]) < 4 / np.sqrt(order.count)


@pytest.mark.parametrize(
    ("num_shards", "lanes"),
    [(0, 1), (1, 1), (7, 1), (8, 2), (255, 32), (256, 64), (767, 64), (768, 192), (3840, 960), (10**6, 960)],
)
def test_default_lanes_leave_four_shards_each(num_shards, lanes):
    assert default_lanes(num_shards) == lanes


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_a_full_permutation_has_every_sample_once_an_epoch(count, seed, epoch):
    positions = np.arange(epoch * count, (epoch + 1) * count)
    assert np.array_equal(np.sort(sample_indices(positions, count, seed)), np.arange(count))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 100), start=st.integers(0, 1000), length=st.integers(1, 500), seed=st.integers(0, 100))
def test_a_place_depends_on_its_position_alone(count, start, length, seed):
    positions = np.arange(start, start + length)  # straddles epochs
    together = sample_indices(positions, count, seed)
    alone = [sample_indices(np.array([position]), count, seed)[0] for position in positions[:: max(1, length // 7)]]
    assert np.array_equal(together[:: max(1, length // 7)], alone)


def test_a_full_permutation_needs_no_table():
    count = 10**12 + 39
    indices = sample_indices(np.array([0, 1, count - 1, count, 5 * count + 3]), count, seed=1)
    assert indices.min() >= 0
    assert indices.max() < count
    assert len(set(indices.tolist())) == 5


def test_epochs_and_seeds_differ():
    count = 1000
    first = sample_indices(np.arange(count), count, seed=0)
    assert (first == sample_indices(np.arange(count, 2 * count), count, seed=0)).sum() < 10
    assert (first == sample_indices(np.arange(count), count, seed=1)).sum() < 10
    assert (first == np.arange(count)).sum() < 10


def test_full_permutations_are_uniform():
    """Where a sample lands over many epochs, and which pairs follow each other, look random (chi-square, 4 sigma)."""
    count, epochs = 10, 20_000
    order = sample_indices(np.arange(count * epochs), count, seed=3).reshape(epochs, count)
    for table in (
        np.array([np.bincount(order[:, place], minlength=count) for place in range(count)]),
        np.bincount((order[:, :-1] * count + order[:, 1:]).ravel(), minlength=count**2).reshape(count, count),
    ):
        cells = table[table > 0].astype(float)
        statistic, freedom = ((cells - cells.mean()) ** 2 / cells.mean()).sum(), len(cells) - 1
        assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_neighbours_in_a_full_permutation_are_uncorrelated():
    order = sample_indices(np.arange(100_000), 100_000, seed=0).astype(float)
    for lag in (1, 2, 32):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 0.015


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_share_out_the_global_batch(world_size):
    parts = [rank_positions(100, 960, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100, 1060))


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="count=0"):
        sample_indices(np.array([0]), 0, 0)


def test_the_full_permutation_is_pinned():
    """This order determines the bytes of every encoded set: it never changes."""
    assert sample_indices(np.array([0, 1, 2, 999, 1000]), 1000, seed=42).tolist() == PINNED


PINNED = [409, 684, 862, 248, 33]
PINNED_LANES = [3, 12, 22, 11, 21, 18, 20, 6, 21, 8, 32, 3]
PINNED_LARGE = [576593, 1100138, 527285, 615872, 880133, 814091]
