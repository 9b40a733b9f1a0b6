import numpy as np
import pytest

from ecar_dist.config.knobs_data import DataSection
from ecar_dist.data.order.stream import OrderMade, SampleStream

COUNTS = [[40, 0, 17], [1], [5, 6, 7, 8]]


def open_stream(counts=COUNTS, weights=(2.0, 1.0, 1.0), **options):
    return SampleStream(counts, seed=3, weights=weights, **{"global_batch_size": 8, **options})


@pytest.mark.parametrize("by_step", [False, True])
def test_places_agree_with_sample_ids_and_with_every_cut(by_step):
    stream = open_stream(by_step=by_step)
    places = stream.locate(np.arange(640))
    found = zip(places.sources, places.shards, places.rows, places.sample_ids, strict=True)
    firsts = [0, 57, 58]
    for source, shard, row, sample in found:
        assert stream.locate_sample(source, sample - firsts[source]) == (shard, row, sample)
        assert 0 <= row < COUNTS[source][shard]
    for cut, stop in ((1, 60), (7, 640), (100, 640)):
        parts = [stream.locate(np.arange(stop)[at : at + cut]) for at in range(0, stop, cut)]
        assert np.concatenate([part.sample_ids for part in parts]).tolist() == places.sample_ids[:stop].tolist()


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("start", [0, 5, 131])
def test_upcoming_names_every_shard_that_the_ranks_touch(by_step, start):
    stream = open_stream(by_step=by_step, made=OrderMade(0))
    for rank in range(4):
        places = stream.locate(np.arange(start + rank, start + 90, 4))
        named = stream.upcoming(start, start + 90, [rank], 4)
        for source, shards in enumerate(named):
            assert set(places.shards[places.sources == source]) <= set(shards)


def test_a_rank_of_a_mixture_by_sample_may_touch_every_lane():
    stream = open_stream([[30] * 16, [30] * 16], weights=(1.0, 1.0), lanes=4, window_shards=1, made=OrderMade(0))
    for rank in range(4):
        places = stream.locate(np.arange(rank, 100, 4))
        for source, shards in enumerate(stream.upcoming(0, 100, [rank], 4)):
            assert set(places.shards[places.sources == source]) <= set(shards)
            assert len(shards) < 16


def test_sources_with_the_same_shards_have_orders_of_their_own():
    stream = open_stream([[50, 50], [50, 50]], weights=(1.0, 1.0))
    places = stream.locate(np.arange(200))
    first, second = (places.sample_ids[places.sources == source] % 100 for source in range(2))
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second) == list(range(100))


@pytest.mark.parametrize(("window_shards", "in_a_window"), [(1, 1), (2, 2), (4, 4), (0, 16)])
def test_a_batch_is_drawn_from_the_whole_window_of_every_lane(window_shards, in_a_window):
    stream = SampleStream([[256] * 128], seed=5, global_batch_size=256, lanes=8, window_shards=window_shards)
    ideal = 8 * in_a_window * (1 - (1 - 1 / in_a_window) ** 32)  # 32 draws in each of 8 lanes
    assert stream.batch_spread() == pytest.approx(ideal, rel=0.06)


def test_the_spread_of_a_mixture_counts_the_shards_of_all_its_sources():
    options = {"weights": (1.0, 1.0), "lanes": 1, "window_shards": 0, "global_batch_size": 200}
    assert open_stream([[64] * 3, [64] * 4], **options).batch_spread() == 7
    assert open_stream([[64] * 3, [64] * 4], **options, by_step=True).batch_spread() in (3.25, 3.5, 3.75)


def test_windows_of_four_shards_by_default_as_in_the_config():
    assert SampleStream([[5]], seed=0, global_batch_size=8).describe()["window_shards"] == 4
    assert DataSection.model_fields["window_shards"].default == 4


def test_the_window_sums_over_the_sources():
    one, other = [64] * 8, [16] * 4
    windows = [open_stream([counts], weights=(1.0,), lanes=2, window_shards=1).window for counts in (one, other)]
    assert windows == [128, 32]
    assert open_stream([one, other], weights=(1.0, 1.0), lanes=2, window_shards=1).window == 160
