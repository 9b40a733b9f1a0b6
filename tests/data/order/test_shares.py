"""The second version of the order: exactly once, the same for any ranks, and no node reads much more than its part."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.data.order.lanes import LaneOrder
from ecar_dist.data.order.mixing import EvenMixture
from ecar_dist.data.order.permutation import bits_for, hash_keys, permute, unpermute
from ecar_dist.data.order.shares import batch_counts, lanes_for, node_multiple
from ecar_dist.data.order.stream import OrderMade, SampleStream

MANY = settings(max_examples=1000, deadline=None)
SOME = settings(max_examples=200, deadline=None)
counts_of_shards = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 3))
@SOME
def test_unpermute_is_the_inverse(size, seed, wider):
    values = np.arange(min(size, 200))
    keys = hash_keys(seed, values)
    bits = bits_for(size) + wider
    assert (unpermute(permute(values, size, keys, bits), size, keys, bits) == values).all()


@given(counts_of_shards, st.integers(1, 40), st.integers(0, 3), st.integers(0, 5), st.integers(0, 99))
@MANY
def test_every_epoch_of_endless_lanes_is_a_permutation(counts, lanes, window_shards, epoch, seed):
    order = LaneOrder(counts, seed, min(lanes, sum(counts)), window_shards, endless=True)
    positions = np.arange(order.count) + epoch * order.count
    assert sorted(order.sample_indices(positions)) == list(range(order.count))


@given(counts_of_shards, st.integers(1, 12), st.integers(0, 2), st.integers(0, 60), st.integers(0, 60), st.data())
@SOME
def test_the_shards_of_some_lanes_are_named(counts, lanes, window_shards, start, length, data):
    order = LaneOrder(counts, 3, min(lanes, sum(counts)), window_shards, endless=True)
    mine = data.draw(st.sets(st.integers(0, order.lanes - 1), min_size=1))
    positions = np.arange(start, start + length)
    used, _ = order.locate(positions[np.isin(positions % order.lanes, list(mine))])
    named = order.upcoming_of(start, start + length, np.array(sorted(mine)))
    assert set(used.tolist()) <= set(named)
    assert len(set(named)) == len(named)


@st.composite
def streams(draw):
    """A stream of one or several sources, with its own batch size and perhaps an older one that made the order."""
    sources = draw(st.lists(counts_of_shards, min_size=1, max_size=3))
    batch = draw(st.sampled_from((4, 6, 8, 12, 24, 32)))
    weights = draw(st.lists(st.sampled_from((1.0, 2.0, 0.3, 5.0)), min_size=len(sources), max_size=len(sources)))
    lanes = draw(st.sampled_from((None, 1, 2, 3, 4)))
    smallest = min(map(sum, sources))
    return SampleStream(
        sources,
        seed=draw(st.integers(0, 50)),
        global_batch_size=batch,
        weights=weights,
        by_step=draw(st.booleans()) and len(sources) > 1,
        lanes=lanes and min(lanes, smallest),
        window_shards=draw(st.integers(0, 2)),
        made=draw(st.sampled_from((None, OrderMade(0), OrderMade(batch * 2), OrderMade(7)))),
    ), batch


@given(streams(), st.integers(0, 9), st.integers(0, 5), st.data())
@MANY
def test_the_parts_of_the_ranks_are_the_batch(drawn, step, offset, data):
    """For any number of ranks, also from a position at which no batch of this size begins."""
    stream, batch = drawn
    start = step * batch + offset
    world = data.draw(st.sampled_from([ranks for ranks in range(1, batch + 1) if batch % ranks == 0]))
    parts = [stream.rank_positions(start, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {batch // world}
    assert sorted(np.concatenate(parts)) == list(range(start, start + batch))

    # What a rank reads in two steps is among the shards that it plans to read.
    rank = data.draw(st.integers(0, world - 1))
    both = [stream.rank_positions(at, rank, world) for at in (start, start + batch)]
    read = stream.locate(np.concatenate(both))
    named = stream.upcoming(start, start + 2 * batch, [rank], world)
    for source, shards in enumerate(named):
        assert set(read.shards[read.sources == source].tolist()) <= set(shards)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99), st.integers(0, 30))
@SOME
def test_an_even_mixture_is_a_bijection_with_a_way_back(weights, seed, block):
    mixture = EvenMixture(weights, seed)
    positions = np.arange(mixture.block) + block * mixture.block
    sources, inside = mixture.split(positions)
    assert (mixture.positions(sources, inside) == positions).all()
    for source, per_block in enumerate(mixture.weights):
        assert sorted(inside[sources == source]) == list(range(block * per_block, (block + 1) * per_block))


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6), st.sampled_from((4096, 24576, 57344, 131072)))
@SOME
def test_the_counts_of_a_batch_follow_the_weights(weights, batch):
    counts = batch_counts(weights, batch)
    if counts is None:  # a small source, for which whole samples are too coarse
        assert min(weights) / sum(weights) * batch < 1 / 0.005
        return
    assert sum(counts) == batch
    for count, weight in zip(counts, weights, strict=True):
        assert count == pytest.approx(weight / sum(weights) * batch, rel=0.005)


@pytest.mark.parametrize(
    ("batch", "multiple"), [(131072, 512), (196608, 1536), (57344, 3584), (64, 64), (7, 7), (1, 1)]
)
def test_every_number_of_nodes_divides_the_multiple(batch, multiple):
    assert node_multiple(batch) == multiple
    assert batch % multiple == 0


@pytest.mark.parametrize(
    ("shards", "count", "batch", "lanes"),
    [
        (24_414, 131_072, 131_072, 4096),
        (24_414, 196_608, 196_608, 3072),
        (24_414, 256, 256, 256),
        (1, 64, 64, 1),
        (64, 64, 64, 16),
        (1000, 2042, 2042, 192),  # twice a prime: the lanes of the first version
    ],
)
def test_lanes_divide_the_batch(shards, count, batch, lanes):
    assert lanes_for(shards, count, batch) == lanes


def over_fetch(stream, batch, nodes, steps):
    """Shards that all nodes read in some steps, divided by those that are needed, from the plans of some nodes."""
    looked_at = sorted({0, 1 % nodes, nodes // 3, nodes // 2, nodes - 1})
    stop = steps * batch
    needed = stream.upcoming(0, stop, [0], 1)
    read = [sum(map(len, stream.upcoming(0, stop, [node], nodes))) for node in looked_at]
    return np.mean(read) * nodes / sum(map(len, needed))


@pytest.mark.parametrize("batch", [131_072, 196_608, 57_344])
def test_every_number_of_nodes_reads_at_most_5_percent_more(batch):
    stream = SampleStream([[4096] * 24_414], seed=1, global_batch_size=batch)
    epoch = stream.count // batch
    for nodes in (nodes for nodes in range(1, 513) if batch % nodes == 0):
        assert over_fetch(stream, batch, nodes, epoch) <= 1.05, nodes


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3)])
def test_so_does_a_mixture(weights):
    shards = [int(weight / sum(weights) * 48_000) for weight in weights]
    sources = [[4096] * number for number in shards]
    stream = SampleStream(sources, seed=1, global_batch_size=131_072, weights=weights)
    epoch = stream.count * 99 // 100 // 131_072  # the sources' epochs end at slightly different positions
    for nodes in (1, 2, 16, 128, 512):
        assert over_fetch(stream, 131_072, nodes, epoch) <= 1.05, nodes


def test_an_order_stays_what_its_first_attempt_made():
    """Also if the batch size changes. The order of the first version stays the same."""
    sources = [[10] * 400]
    made = SampleStream(sources, seed=1, global_batch_size=64)
    recorded = {f"data_order.{name}": value for name, value in made.describe().items()}
    again = SampleStream(sources, seed=1, global_batch_size=96, made=OrderMade.recorded(recorded))
    assert again.describe() == made.describe()
    assert SampleStream(sources, seed=1, global_batch_size=96).describe() != made.describe()

    old = {"data_order.name": "lanes-feistel-v1", "data_order.lanes": 64}
    first = SampleStream(sources, seed=1, global_batch_size=96, made=OrderMade.recorded(old))
    assert first.describe() == {"name": "lanes-feistel-v1", "seed": 1, "lanes": 64, "window_shards": 4}
    assert (first.rank_positions(96, 1, 4) == np.arange(97, 192, 4)).all()
    assert OrderMade.recorded({}) is None


def test_a_thousand_orders_are_read_exactly_once():
    """Random sets, weights, batches and ranks: each batch is divided exactly once, step by step and all at once."""
    rng = random.Random(0)
    together = 0
    for case in range(1000):
        batch = rng.choice([4, 6, 8, 12, 16, 24])
        ranks = rng.choice([number for number in range(1, batch + 1) if batch % number == 0])
        sources = [[rng.randint(1, 9) for _ in range(rng.randint(1, 40))] for _ in range(rng.choice([1, 1, 2, 3]))]
        options = {"weights": [rng.choice([1.0, 2.0, 0.3]) for _ in sources], "by_step": rng.random() < 0.3}
        options["made"] = rng.choice([None, None, OrderMade(0), OrderMade(12)])
        stream = SampleStream(sources, seed=case, global_batch_size=batch, **options)
        begin = rng.randrange(9) * batch
        starts = range(begin, begin + rng.randint(1, 5) * batch, batch)
        whole = []
        for rank in range(ranks):
            parts = [stream.rank_positions(start, rank, ranks) for start in starts]
            assert all(len(part) == batch // ranks and (np.diff(part) > 0).all() for part in parts), case
            together += len(starts) > 1
            assert stream.positions_of_steps(starts, rank, ranks).tolist() == np.concatenate(parts).tolist(), case
            whole += parts
        assert sorted(np.concatenate(whole).tolist()) == list(range(starts[0], starts[-1] + batch)), case
        if len(sources) == 1:
            epoch = stream.locate(np.arange(stream.count))
            assert sorted(epoch.sample_ids.tolist()) == list(range(stream.count)), case
    assert together > 1000
