"""All ranks read a step or none does. Together they read the global batch, each position once, with its own sample."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.errors import DataError
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.start.roll_call import Decision
from ecar_dist.runtime.world import World
from ecar_dist.train import reader as module
from ecar_dist.train.flags import Flags
from ecar_dist.train.reader import StepReader, _read, _sum, check_shares, judge_shares
from ecar_dist.train.time_budget import Phases
from tests.train.pretend import ALONE, Pair, PretendLoader, make_batch, sized_config

BATCH, START, RANKS = 12, 36, 3
NODES = ("n1", "n2", "n3")
STREAM = SampleStream([[40, 40, 17]], seed=3, global_batch_size=BATCH, lanes=1, window_shards=1)


def micro_batches(rank, size=RANKS, stream=STREAM, start=START):
    places = stream.locate(stream.rank_positions(start, rank, size))
    values, labels = torch.zeros(len(places), 1), torch.zeros(len(places))
    whole = MicroBatch(values, labels, torch.from_numpy(places.positions), torch.from_numpy(places.sample_ids))
    half = len(places) // 2
    return [
        MicroBatch(*(getattr(whole, name)[part] for name in ("values", "labels", "positions", "sample_ids")))
        for part in (slice(half), slice(half, None))
    ]


def verdict(*batches, batch_hashes=(1, 1, 1)):
    expected = [_read(micro_batches(rank)) for rank in range(RANKS)]
    rows = [[seen, _read(read)] for seen, read in zip(batch_hashes, batches, strict=True)]
    return judge_shares(rows, expected, NODES, START)


def test_the_whole_batch_is_well_and_its_hash_is_the_sum_of_the_shares():
    assert verdict(*(micro_batches(rank) for rank in range(RANKS))) == Decision(NODES)
    positions = np.arange(START, START + BATCH)
    parts = sum(_read(micro_batches(rank)) for rank in range(RANKS))
    assert (parts - _sum(positions, STREAM.locate(positions).sample_ids)) % 2**64 == 0


@pytest.mark.parametrize(
    "read",
    [
        micro_batches(0),  # twice what another rank reads
        micro_batches(1, start=START + BATCH),  # the next batch
        micro_batches(1)[:1],  # a part
        micro_batches(1, size=4),  # a different number of ranks
        micro_batches(1, stream=SampleStream([[40, 40, 17]], seed=4, global_batch_size=BATCH, lanes=1)),
    ],
)
def test_a_rank_that_reads_something_else_is_named(read):
    found = verdict(micro_batches(0), read, micro_batches(2))
    assert found.problem.startswith("rank 1 on n2 ")
    assert not found.again


def test_another_order_on_one_rank_is_named():
    batches = [micro_batches(rank) for rank in range(RANKS)]
    assert verdict(*batches, batch_hashes=(1, 1, 2)).problem.startswith("rank 2 on n3:")
    assert verdict(*batches, batch_hashes=(1, 3, 2)).problem.startswith("rank 0 on n1; rank 1 on n2; rank 2 on n3:")


def test_a_substitute_counts_as_what_it_stands_for():
    first, second = micro_batches(1)
    ids, at = first.sample_ids.clone(), int(first.positions[1])
    ids[1] = 95
    made = (Substitution(at, int(first.sample_ids[1]), 94, "damaged"), Substitution(at, 94, 95, "damaged"))
    replaced = MicroBatch(first.values, first.labels, first.positions, ids, made)
    assert verdict(micro_batches(0), [replaced, second], micro_batches(2)).problem == ""
    unsaid = MicroBatch(first.values, first.labels, first.positions, ids)
    assert verdict(micro_batches(0), [unsaid, second], micro_batches(2)).problem != ""


def test_alone_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(module, "enforce", lambda *arguments: pytest.fail("compared"))
    check_shares(World(Placement(), torch.device("cpu")), None, [], 0, BATCH)


BEGUN = Progress(8, 2)


def make_reader(*loaders, world=ALONE, stop=False, beats=None, total=4000):
    """Two micro-batches per step on a single rank; `loaders` are opened in turn."""
    config, left = sized_config(micro_batch_size=2), list(loaders)
    config = config.model_copy(update={"train": config.train.model_copy(update={"total_samples": total})})
    phases = Phases(lambda name, step: beats is None or beats.append((name, step)))
    return StepReader(
        config=config, world=world, open_loader=lambda _: left.pop(0), position=8, stop=stop, phases=phases
    )


def after(steps):
    return Progress(8 + 4 * steps, 2 + steps)


def test_the_last_step_that_begins_is_the_last_whose_samples_are_there():
    """Whichever step it is: the first, the second, or a later one, whose flags come two steps ahead."""
    for good in range(5):
        batch, beats = make_batch(2), []
        reader = make_reader(PretendLoader(*[batch] * good, DataError("shard x is damaged")), beats=beats)
        for step in range(good):
            assert reader.begin(after(step)) == [batch, batch]
            assert beats[-1] == ("data", 3 + step)
            reader.settle(3 + step, reader.flags(ready=False))
        assert reader.begin(after(good)) is None
        assert not reader.goes_on(2 + good)
        with pytest.raises(DataError, match="shard x"):
            reader.raise_error()


def test_without_an_error_there_is_nothing_to_raise():
    reader = make_reader(PretendLoader(*[make_batch(2)] * 3))
    reader.begin(BEGUN)
    reader.settle(3, reader.flags(ready=False))
    assert reader.goes_on(3)
    reader.raise_error()


def test_nothing_is_taken_beyond_the_end_of_the_run():
    loader = PretendLoader(*[make_batch(2)] * 5)
    reader = make_reader(loader, total=8 + 4 * 3)
    left = []
    for step in range(3):
        reader.begin(after(step))
        left.append(len(loader.given))
    assert left == [2, 2, 2]


@pytest.mark.parametrize("given", [(make_batch(2),) * 3, ()])
def test_no_step_begins_once_a_stop_was_asked_for_whether_or_not_its_data_is_there(given):
    reader = make_reader(PretendLoader(*given), stop=True)
    assert reader.begin(BEGUN) is None
    reader.raise_error()


def test_a_stop_ends_the_run_after_the_step_that_was_queued_when_it_is_seen():
    reader = make_reader(PretendLoader(*[make_batch(2)] * 4))
    assert reader.begin(BEGUN)
    reader._stop = True
    flags = reader.flags(ready=True)
    assert flags == Flags(stop=1.0, failed=0.0, ready=1.0)
    assert reader.begin(after(1))
    reader.settle(3, flags)
    assert not reader.goes_on(4)
    assert reader.begin(after(2)) is None


@pytest.mark.parametrize(
    ("other", "steps"),
    [
        ([0.0, 0.0, 0.0], 2),  # asked to stop, cannot read a step, cannot even read the first
        ([1.0, 0.0, 0.0], 0),
        ([0.0, 1.0, 0.0], 1),
        ([0.0, 1.0, 1.0], 0),
    ],
)
def test_two_ranks_begin_and_end_together(monkeypatch, other, steps):
    monkeypatch.setattr(module, "check_shares", lambda *arguments: None)
    world = Pair(other=other)
    reader = make_reader(PretendLoader(*[make_batch(2)] * 4), world=world)
    assert [reader.begin(after(step)) is not None for step in range(2)] == [step < steps for step in range(2)]
    world.gather = lambda value: [value, "the other rank's error"]
    if other[1]:
        with pytest.raises(RemoteError, match="rank 1"):
            reader.raise_error()
    else:
        reader.raise_error()


def test_the_flags_of_a_step_are_about_the_step_after_the_next():
    reader = make_reader(PretendLoader(*[make_batch(2)] * 9))
    reader.begin(BEGUN)
    reader.settle(3, Flags(stop=0.0, failed=1.0, ready=0.0))  # of another rank
    assert [reader.goes_on(step) for step in (2, 3, 4, 5)] == [True, True, False, False]


def test_shares_are_compared_once_before_the_first_step(monkeypatch):
    compared = []
    monkeypatch.setattr(module, "check_shares", lambda *arguments: compared.append(arguments[3:]))
    reader = make_reader(PretendLoader(*[make_batch(2)] * 4), PretendLoader(*[make_batch(2)] * 3))
    reader.begin(BEGUN)
    reader.begin(after(1))
    reader.seek(8)
    reader.begin(BEGUN)
    assert compared == [(8, 4)]


def test_after_a_seek_an_error_that_was_ahead_counts_no_more():
    good = [make_batch(2)] * 3
    reader = make_reader(PretendLoader(make_batch(2), DataError("shard x is damaged")), PretendLoader(*good))
    reader.begin(BEGUN)
    reader.seek(8)
    assert reader.begin(BEGUN)
    assert reader.goes_on(9)
    reader.raise_error()


def test_another_position_is_another_loader_and_the_wait_adds_up():
    first, second = PretendLoader(), PretendLoader(make_batch(2))
    reader = make_reader(first, second)
    reader.seek(12)
    assert (first.closed, second.closed) == (True, False)
    assert reader.wait_seconds == first.wait_seconds + second.wait_seconds
    reader.close()
    assert second.closed


def test_what_was_downloaded_is_the_sum_over_the_sources():
    counts = {"requests": 3, "bytes": 2**30, "retries": 1}
    loader = PretendLoader()
    loader.sources = [
        SimpleNamespace(traffic=lambda: counts),
        SimpleNamespace(traffic=lambda: {**counts, "requests": 0}),
    ]
    reader = make_reader(loader)
    assert reader.traffic() == {"data/downloaded_gib": 2.0, "data/retries": 2}
    loader.sources = [SimpleNamespace(traffic=dict)]
    assert reader.traffic() == {}
