"""Whether ranks read a global batch together: each position once, with the sample that the order has there."""

import numpy as np
import pytest
import torch

from ecar_dist.data.loader import MicroBatch
from ecar_dist.data.order.lanes import rank_positions
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.start.roll_call import Decision
from ecar_dist.runtime.world import World
from ecar_dist.train import shares
from ecar_dist.train.shares import _read, _sum, check_shares, judge_shares

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
    monkeypatch.setattr(shares, "enforce", lambda *arguments: pytest.fail("compared"))
    check_shares(World(Placement(), torch.device("cpu")), None, [], 0, BATCH)
