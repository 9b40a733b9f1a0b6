import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.data.order import rank_positions, sample_indices


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(count, seed, epoch):
    positions = np.arange(epoch * count, (epoch + 1) * count)
    assert np.array_equal(np.sort(sample_indices(positions, count, seed)), np.arange(count))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 100), start=st.integers(0, 1000), length=st.integers(1, 500), seed=st.integers(0, 100))
def test_a_place_depends_on_its_position_alone(count, start, length, seed):
    positions = np.arange(start, start + length)  # straddles epochs
    together = sample_indices(positions, count, seed)
    alone = [sample_indices(np.array([position]), count, seed)[0] for position in positions[:: max(1, length // 7)]]
    assert np.array_equal(together[:: max(1, length // 7)], alone)


def test_huge_sets_need_no_table():
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


def test_order_is_uniform():
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


def test_neighbours_are_uncorrelated():
    order = sample_indices(np.arange(100_000), 100_000, seed=0).astype(float)
    for lag in (1, 2, 32):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 0.015


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_ranks_share_out_the_global_batch(world_size):
    parts = [rank_positions(100, 24, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100, 124))


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="count=0"):
        sample_indices(np.array([0]), 0, 0)


def test_the_order_is_pinned():
    """These numbers are part of every run's identity: another order needs another ORDER_NAME."""
    assert sample_indices(np.array([0, 1, 2, 999, 1000]), 1000, seed=42).tolist() == PINNED


PINNED = [409, 684, 862, 248, 33]
