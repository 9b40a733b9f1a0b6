"""All ranks read a step or none does; together they read the global batch, each position once, with its own sample."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.order.lanes import rank_positions
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.errors import DataError
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.start.roll_call import Decision
from ecar_dist.runtime.world import World
from ecar_dist.train import reader as module
from ecar_dist.train.reader import StepReader, _read, _sum, check_shares, judge_shares
from ecar_dist.train.time_budget import Phases
from tests.train.pretend import ALONE, Pair, PretendLoader, make_batch, sized_config

BATCH, START, RANKS = 12, 36, 3
NODES = ("n1", "n2", "n3")
STREAM = SampleStream([[40, 40, 17]], seed=3, global_batch_size=BATCH, lanes=1, window_shards=1)


def micro_batches(rank, size=RANKS, stream=STREAM, start=START):
    places = stream.locate(rank_positions(start, BATCH, rank, size))
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
        micro_batches(1, size=4),  # another number of ranks
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


def make_reader(*loaders, world=ALONE, stop=False, beats=None):
    """Two micro-batches a step when alone; `loaders` are opened in turn."""
    config, left = sized_config(micro_batch_size=2), list(loaders)
    phases = Phases(lambda name, step: beats is None or beats.append((name, step)))
    return StepReader(
        config=config, world=world, open_loader=lambda _: left.pop(0), position=8, stop=stop, phases=phases
    )


def test_a_step_begins_when_its_data_is_there():
    batch, beats = make_batch(2), []
    reader = make_reader(PretendLoader(batch, DataError("shard x is damaged")), beats=beats)
    assert reader.read(BEGUN, ready=False) == ([batch, batch], False)
    assert beats[1:] == [("data", 3)]
    reader.raise_error()  # there is none
    assert reader.read(BEGUN, ready=True) == (None, True)
    with pytest.raises(DataError, match="shard x"):
        reader.raise_error()


@pytest.mark.parametrize("given", [(make_batch(2),), ()])
def test_a_step_does_not_begin_once_a_stop_was_asked_for_whether_or_not_its_data_is_there(given):
    reader = make_reader(PretendLoader(*given), stop=True)
    assert reader.read(BEGUN, ready=False).batches is None
    reader.raise_error()


@pytest.mark.parametrize(
    ("ready", "other", "all_ready", "failed", "begins"),
    [
        (False, [0.0, 0.0, 1.0], False, False, True),  # stop asked, data failed, part of the checkpoint written
        (True, [0.0, 0.0, 0.0], False, False, True),
        (True, [0.0, 0.0, 1.0], True, False, True),
        (True, [1.0, 0.0, 1.0], True, False, False),
        (True, [0.0, 1.0, 1.0], True, True, False),
    ],
)
def test_two_ranks_begin_and_end_together(monkeypatch, ready, other, all_ready, failed, begins):
    monkeypatch.setattr(module, "check_shares", lambda *arguments: None)
    world = Pair(other=other)
    reader = make_reader(PretendLoader(make_batch(2)), world=world)
    batches, found = reader.read(BEGUN, ready)
    assert (batches is not None, found) == (begins, all_ready)
    world.gather = lambda value: [value, "the other rank's error"]
    if failed:
        with pytest.raises(RemoteError, match="rank 1"):
            reader.raise_error()
    else:
        reader.raise_error()


def test_shares_are_compared_once_before_the_first_step(monkeypatch):
    compared = []
    monkeypatch.setattr(module, "check_shares", lambda *arguments: compared.append(arguments[3:]))
    reader = make_reader(PretendLoader(*[make_batch(2)] * 2), PretendLoader(make_batch(2)))
    reader.read(BEGUN, ready=False)
    reader.read(Progress(12, 3), ready=False)
    reader.seek(8)
    reader.read(BEGUN, ready=False)
    assert compared == [(8, 4)]


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
