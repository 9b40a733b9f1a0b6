import numpy as np
import pytest

from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import BadSamples, Substitutes
from ecar_dist.errors import DataError

COUNTS = [[10, 20, 30], [25, 15]]


def open_stream(counts=COUNTS):
    weights = [1.0] * len(counts)
    return SampleStream(counts, seed=7, global_batch_size=8, weights=weights)


def replace_all(bad, *, max_bad=0.5, whole_shards=True, counts=COUNTS, positions=200, batch=25):
    """What a loader reads if `bad(source, shard, row)`: (position, source, id) of each sample, and the substitutes."""
    stream = open_stream(counts)
    substitutes, read, listed = Substitutes(stream, 7, max_bad), [], []
    for start in range(0, positions, batch):
        places = stream.locate(np.arange(start, min(start + batch, positions)))
        while True:
            where = zip(places.sources.tolist(), places.shards.tolist(), places.rows.tolist(), strict=True)
            reasons = {at: f"{place} is bad" for at, place in enumerate(where) if bad(*place)}
            if not reasons:
                break
            places = substitutes.replace(places, BadSamples(reasons, whole_shards=whole_shards))
        read += zip(places.positions.tolist(), places.sources.tolist(), places.sample_ids.tolist(), strict=True)
        listed += substitutes.take()
    return read, listed


@pytest.mark.parametrize("batch", [1, 40, 200])
def test_substitutes_do_not_depend_on_the_batch(batch):
    def bad(source, shard, row):
        return (source, shard) in ((0, 1), (1, 0))

    read, listed = replace_all(bad, batch=batch, max_bad=0.9)
    again, also_listed = replace_all(bad, max_bad=0.9)
    assert read == again
    assert sorted(listed, key=lambda one: one.position) == sorted(also_listed, key=lambda one: one.position)


def test_each_is_of_the_same_source_and_a_bad_one_is_replaced_again():
    read, listed = replace_all(lambda source, shard, row: (source, shard) == (0, 2))  # half of source 0
    stream = open_stream()
    wanted = stream.locate(np.arange(200))
    assert [source for _, source, _ in read] == wanted.sources.tolist()
    assert all(not 30 <= sample < 60 for _, _, sample in read)
    chains = {}
    for one in listed:
        assert one.reason.endswith("is bad")
        chains.setdefault(one.position, [int(wanted.sample_ids[one.position])])
        assert chains[one.position][-1] == one.sample_id  # each replaces the previous one
        chains[one.position].append(one.replaced_by)
    final = {position: sample for position, _, sample in read}
    assert chains == {position: chain for position, chain in chains.items() if chain[-1] == final[position]}
    assert max(len(chain) for chain in chains.values()) > 3
    assert len({chain[1] for chain in chains.values()}) > 20  # not all with the same one


@pytest.mark.parametrize(("whole_shards", "lost"), [(True, 20), (False, 1)])
def test_the_bound_counts_every_lost_sample_once(whole_shards, lost):
    def bad(source, shard, row):
        return (source, shard) == (0, 1) and (whole_shards or row == 3)

    replace_all(bad, max_bad=lost / 100, whole_shards=whole_shards, positions=600)
    with pytest.raises(DataError, match=rf" {lost} of 100 .*data\.max_bad={(lost - 0.5) / 100:g} "):
        replace_all(bad, max_bad=(lost - 0.5) / 100, whole_shards=whole_shards, positions=600)


def test_rows_and_shards_of_different_sources_are_counted_separately():
    def bad(source, shard, row):
        return shard == 1 and row == 3

    with pytest.raises(DataError, match=" 2 of 100 "):
        replace_all(bad, max_bad=0.015, whole_shards=False, positions=600)
    with pytest.raises(DataError, match=" 35 of 100 "):
        replace_all(lambda source, shard, row: shard == 1, max_bad=0.3, positions=600)


def test_without_substitution_the_first_bad_sample_is_the_error():
    with pytest.raises(DataError, match=r"^\(1, 0, \d+\) .*data.on_bad=substitute"):
        replace_all(lambda source, shard, row: source == 1 and shard == 0, max_bad=0.0)


@pytest.mark.parametrize("whole_shards", [True, False])
def test_a_source_without_good_samples_is_an_error(whole_shards):
    with pytest.raises(DataError, match=" all 40 samples"):
        replace_all(lambda source, shard, row: source == 1, max_bad=0.9, whole_shards=whole_shards)
    with pytest.raises(DataError, match=" all 6 samples"):
        replace_all(lambda *place: True, max_bad=1.0, whole_shards=whole_shards, counts=[[2, 4]])


def test_substitutes_never_change_from_one_release_to_the_next():
    """A run that resumes must get the same ones."""
    _, listed = replace_all(lambda source, shard, row: (source, shard) == (0, 2))
    assert [(one.position, one.sample_id, one.replaced_by) for one in listed[:4]] == [
        (3, 52, 11),
        (7, 46, 22),
        (12, 30, 12),
        (15, 43, 2),
    ]


def test_a_replacement_leaves_its_argument_alone_and_a_position_read_again_has_the_same_one():
    substitutes, places = Substitutes(open_stream(), 7, 0.5), open_stream().locate(np.arange(9))
    before = places.sample_ids.tolist()
    bad = BadSamples({4: "image x is bad"}, whole_shards=False)
    first = substitutes.replace(places, bad)
    assert places.sample_ids.tolist() == before != first.sample_ids.tolist()
    assert substitutes.replace(first, bad).sample_ids[4] != first.sample_ids[4]
    assert [one.position for one in substitutes.take()] == [4, 4]
    assert substitutes.replace(places, bad).sample_ids.tolist() == first.sample_ids.tolist()
