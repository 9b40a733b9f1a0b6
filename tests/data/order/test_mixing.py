import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_dist.data.order.lanes import LaneOrder, rank_positions
from ecar_dist.data.order.mixing import Buckets, Mixture, whole_weights
from ecar_dist.errors import ConfigError

WEIGHTS = st.lists(st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.25, 0.7, 1 / 3])), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**63 - 1)


def streams(split, positions):
    """For each source, the positions inside it in the order in which they are read."""
    sources, inside = split(positions)
    return {source: inside[sources == source].tolist() for source in set(sources.tolist())}


class TestMixture:
    @settings(max_examples=150, deadline=None)
    @given(weights=WEIGHTS, seed=SEEDS, total=st.integers(600, 900), block=st.integers(0, 10**6))
    def test_every_block_has_the_exact_proportions(self, weights, seed, total, block):
        mixture = Mixture(weights, seed, total)
        assert mixture.block <= total
        positions = np.arange(block * mixture.block, (block + 3) * mixture.block)
        sources, _ = mixture.split(positions.reshape(3, -1))
        for row in sources:
            assert np.bincount(row, minlength=len(weights)).tolist() == mixture.weights

    @settings(max_examples=150, deadline=None)
    @given(weights=WEIGHTS, seed=SEEDS, start=st.integers(0, 10**9), length=st.integers(1, 400), data=st.data())
    def test_a_source_gives_its_stream_without_gap_or_repeat(self, weights, seed, start, length, data):
        mixture = Mixture(weights, seed, total=600)
        positions = np.arange(start, start + length)
        before, after = mixture.consumed(start), mixture.consumed(start + length)
        assert before.sum() == start
        found = streams(mixture.split, positions)
        assert found == {s: list(range(before[s], after[s])) for s in range(len(weights)) if before[s] < after[s]}
        block = data.draw(st.integers(1, length))
        parts = [mixture.split(part) for part in np.split(positions, range(block, length, block))]
        for whole, pieces in zip(mixture.split(positions), zip(*parts, strict=True), strict=True):
            assert np.array_equal(np.concatenate(pieces), whole)

    def test_the_example_of_the_module_is_true(self):
        sources, inside = Mixture([2, 1], seed=0).split(np.arange(6))
        assert sources.tolist() == [0, 1, 0, 0, 0, 1]
        assert inside.tolist() == [0, 0, 1, 2, 3, 1]

    def test_one_source_is_the_identity(self):
        positions = np.array([[0, 5], [10**12, 3]])
        sources, inside = Mixture([0.3], seed=9).split(positions)
        assert np.array_equal(inside, positions)
        assert not sources.any()
        assert Mixture([0.3], seed=9).consumed(77).tolist() == [77]

    def test_sources_of_a_mixture_keep_their_epochs(self):
        """Over a run, every epoch of every source contains each of its samples once."""
        orders = [LaneOrder([4, 1, 8], 1, lanes=2, window_shards=4), LaneOrder([3, 3], 1, lanes=1, window_shards=4)]
        mixture = Mixture([2, 1], seed=5)
        found = streams(mixture.split, np.arange(234))
        for source, order in enumerate(orders):
            indices = order.sample_indices(np.array(found[source])).reshape(-1, order.count)
            assert np.array_equal(np.sort(indices, axis=1), np.tile(np.arange(order.count), (len(indices), 1)))

    def test_blocks_and_seeds_mix_differently_and_evenly(self):
        rows = Mixture([1, 2, 5], seed=0).split(np.arange(8 * 5000))[0].reshape(-1, 8)
        assert len({tuple(row) for row in rows.tolist()}) == 8 * 7 * 6 // 2, "every arrangement of 1, 2 and 5"
        share = (rows == 0).mean(axis=0)
        assert np.abs(share - 1 / 8).max() < 4 * np.sqrt(1 / 8 * 7 / 8 / 5000)
        other = Mixture([1, 2, 5], seed=1).split(np.arange(8 * 5000))[0].reshape(-1, 8)
        assert (rows == other).all(axis=1).mean() < 0.02

    def test_many_sources_and_large_blocks(self):
        mixture = Mixture([1] * 299 + [100_000], seed=2, total=2**17)
        found = streams(mixture.split, np.arange(mixture.block))
        assert {source: len(stream) for source, stream in found.items()} == dict(enumerate(mixture.weights))

    def test_the_description_of_a_mixture(self):
        assert Mixture([0.5, 1.5], 3).describe() == {"name": "mixture-v1", "seed": 3, "weights": [1, 3]}

    def test_the_mixture_is_pinned(self):
        """The mixture is part of every run's identity: a changed mixture needs a new `Mixture.name`."""
        sources, inside = Mixture([0.5, 0.3, 0.2], seed=42).split(np.arange(7, 17))
        assert sources.tolist() == PINNED_SOURCES
        assert inside.tolist() == PINNED_INSIDE


class TestBuckets:
    @settings(max_examples=100, deadline=None)
    @given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5), seed=SEEDS, data=st.data())
    def test_a_step_is_of_one_bucket_on_every_rank(self, sizes, seed, data):
        world_size = data.draw(st.sampled_from([1, 2, 3, 5, 8, 12, 64]))
        global_batch_size = world_size * data.draw(st.integers(1, 3))
        buckets = Buckets(sizes, seed, global_batch_size)
        first = data.draw(st.integers(0, 1000))
        for step in range(first, first + 5):
            start = step * global_batch_size
            parts = [
                buckets.split(rank_positions(start, global_batch_size, rank, world_size)) for rank in range(world_size)
            ]
            assert len({bucket for chosen, _ in parts for bucket in chosen.tolist()}) == 1
            bucket = int(parts[0][0][0])
            inside = sorted(place for _, places in parts for place in places.tolist())
            assert inside == list(range(buckets.consumed(start)[bucket], buckets.consumed(start)[bucket] + len(inside)))
            for rank, (_, places) in enumerate(parts):
                assert (places % world_size == rank).all()

    @settings(max_examples=100, deadline=None)
    @given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5), seed=SEEDS, stop=st.integers(0, 3000))
    def test_a_bucket_gives_its_stream_without_gap_or_repeat(self, sizes, seed, stop):
        buckets = Buckets(sizes, seed, global_batch_size=6)
        found = streams(buckets.split, np.arange(stop))
        lengths = {bucket: int(length) for bucket, length in enumerate(buckets.consumed(stop)) if length}
        assert found == {bucket: list(range(length)) for bucket, length in lengths.items()}

    def test_steps_are_shared_out_by_size_or_by_weight(self):
        sizes = [3000, 1000]
        for weights, share in ((None, [30, 10]), ([1, 4], [8, 32])):
            buckets = Buckets(sizes, 0, 16, weights)
            steps = buckets.split(np.arange(0, 40 * 16, 16))[0]
            assert np.bincount(steps).tolist() == share
            assert len(set(np.diff(steps).tolist())) > 1, "the steps are mixed"

    def test_a_description_holds_the_global_batch(self):
        described = Buckets([30, 10], 3, 16).describe()
        assert described == {"name": "buckets-v1", "seed": 3, "weights": [3, 1], "global_batch_size": 16}

    def test_each_bucket_needs_a_weight(self):
        with pytest.raises(ConfigError, match="1 weights for 2 buckets"):
            Buckets([3, 4], 0, 8, weights=[1])

    def test_the_buckets_are_pinned(self):
        """The buckets are part of every run's identity: changed buckets need a new `Buckets.name`."""
        buckets, inside = Buckets([500, 300, 200], seed=42, global_batch_size=4).split(np.arange(30, 66, 4))
        assert buckets.tolist() == PINNED_BUCKETS
        assert inside.tolist() == PINNED_BUCKET_PLACES


class TestWholeWeights:
    @pytest.mark.parametrize(
        ("weights", "total", "whole"),
        [
            ([7], 4096, [1]),
            ([1, 2], 4096, [1, 2]),
            ([0.1, 0.2, 0.7], 4096, [1, 2, 7]),
            ([1 / 3, 1 / 3, 1 / 3], 4096, [1, 1, 1]),
            ([1e-3, 1], 4096, [1, 1000]),
            ([1_281_167, 50_000], 4096, [1971, 77]),
            ([1, 1, 1], 2, None),
            ([5, 3, 1], 8, [4, 3, 1]),  # 4.44, 2.67, 0.89: the two largest remainders are rounded up
        ],
    )
    def test_shares_are_the_nearest_whole_numbers(self, weights, total, whole):
        if whole is None:
            with pytest.raises(ConfigError, match="weight 2"):
                whole_weights(weights, total)
        else:
            assert whole_weights(weights, total) == whole

    @settings(max_examples=100, deadline=None)
    @given(weights=st.lists(st.floats(1.0, 50.0), min_size=1, max_size=8))
    def test_no_share_is_off_by_more_than_one_place(self, weights):
        whole = whole_weights(weights, 4096)
        for number, weight in zip(whole, weights, strict=True):
            assert abs(number / sum(whole) - weight / sum(weights)) <= 1 / 4096
            assert number >= 1

    @pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
    def test_a_weight_is_a_positive_number(self, weight):
        with pytest.raises(ConfigError, match=f"weight 1 is {weight}"):
            whole_weights([1, weight], 4096)

    def test_a_source_too_small_for_the_block_is_refused(self):
        with pytest.raises(ConfigError, match=r"weight 1 is 1e-06 .* 4096\b"):
            whole_weights([1, 1e-6], 4096)

    def test_nothing_to_mix(self):
        with pytest.raises(ConfigError, match="0 sources"):
            whole_weights([], 4096)


PINNED_SOURCES = [1, 2, 0, 0, 0, 2, 0, 2, 0, 1]
PINNED_INSIDE = [2, 1, 4, 5, 6, 2, 7, 3, 8, 3]
PINNED_BUCKETS = [1, 2, 0, 0, 0, 2, 0, 2, 0]
PINNED_BUCKET_PLACES = [10, 6, 18, 22, 26, 10, 30, 14, 34]
