"""Whether the ranks' shares of a global batch are together that batch: each of its positions once, with its sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ecar_dist.data.loader import MicroBatch, SampleLoader
from ecar_dist.data.order.permutation import hash_keys
from ecar_dist.runtime.start.agreement import odd_ranks
from ecar_dist.runtime.start.roll_call import Decision, enforce, ranks_on_nodes
from ecar_dist.runtime.world import World

_SHARES = int.from_bytes(b"share", "big")  # what a key is for
_FIX = "install the same version of ecar_dist on all nodes and start every rank with the same config and data"


def check_shares(
    world: World, loader: SampleLoader, batches: Sequence[MicroBatch], start: int, global_batch_size: int
) -> None:
    """The micro-batches of all ranks are together the global batch from position `start` on. Collective.

    Compared are sums of hashes of (position, sample id), so one small sum over ranks will do. Raises ConfigError on
    rank 0 with the ranks that read something else, RemoteError on the others. Nothing to compare where a rank is alone.
    """
    if world.size == 1:
        return
    positions = np.arange(start, start + global_batch_size)
    ids = loader.stream.locate(positions).sample_ids
    shares = [_sum(positions[rank :: world.size], ids[rank :: world.size]) for rank in range(world.size)]
    rows = world.of_each(torch.tensor([_sum(positions, ids), _read(batches)]))
    enforce(world, judge_shares(rows, shares, world.nodes, start))


def judge_shares(rows: Sequence[Sequence[int]], shares: Sequence[int], nodes: Sequence[str], start: int) -> Decision:
    """Pure. `rows`: of every rank the hash of the whole batch in its order, and of what it read; `shares`: of what each
    rank should read."""
    batches, read = ([row[column] for row in rows] for column in range(2))
    if len(set(batches)) > 1:
        who = ranks_on_nodes(odd_ranks(batches) or range(len(batches)), nodes)
        what = "another order of samples" if odd_ranks(batches) else "different orders of samples"
        return Decision(tuple(nodes), problem=f"{who}: {what} from position {start}; {_FIX}")
    wrong = [rank for rank, (found, share) in enumerate(zip(read, shares, strict=True)) if found != share]
    if wrong:
        who = ranks_on_nodes(wrong, nodes)
        return Decision(
            tuple(nodes), problem=f"{who} read other samples than their share of the batch at {start}; {_FIX}"
        )
    return Decision(tuple(nodes))


def _read(batches: Sequence[MicroBatch]) -> int:
    """The hash of what was read; for a damaged sample's substitute it is the damaged one's id that counts."""
    positions, ids = (
        np.concatenate(parts) for parts in zip(*((b.positions, b.sample_ids) for b in batches), strict=True)
    )
    meant = {one.position: one.sample_id for batch in batches for one in reversed(batch.substitutions)}
    return _sum(
        positions, np.array([meant.get(at, found) for at, found in zip(positions.tolist(), ids.tolist(), strict=True)])
    )


def _sum(positions: np.ndarray, ids: np.ndarray) -> int:
    """Of the pairs' hashes, in any order, as an int64."""
    return int(hash_keys(0, _SHARES, positions, ids).sum(dtype=np.uint64).astype(np.int64))
