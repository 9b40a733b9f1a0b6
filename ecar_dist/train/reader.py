"""The samples of each step: all ranks have theirs, or none of them begins the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch, SampleLoader
from ecar_dist.data.order.permutation import hash_keys
from ecar_dist.errors import EcarError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.signals import StopRequest
from ecar_dist.runtime.start.agreement import odd_ranks
from ecar_dist.runtime.start.roll_call import Decision, enforce, ranks_on_nodes
from ecar_dist.runtime.world import World
from ecar_dist.train.time_budget import Phases

_SHARES = int.from_bytes(b"share", "big")  # what a key is for
_FIX = "install the same version of ecar_dist on all nodes and start every rank with the same config and data"


class StepStart(NamedTuple):
    """What the ranks agree on before a step."""

    batches: list[MicroBatch] | None  # this rank's; None on all ranks where the step must not begin
    all_ready: bool  # whether every rank said that it is `ready`


class StepReader:
    """This rank's micro-batches, step by step. Owns the loader."""

    def __init__(
        self,
        *,
        config: RunConfig,
        world: World,
        open_loader: Callable[[int], SampleLoader],
        position: int,
        stop: StopRequest,
        phases: Phases,
    ) -> None:
        """`open_loader(position)`: a loader at a position of the run's sample order; opened at `position` at once."""
        self._global_batch_size = config.batch.global_batch_size
        self._grad_accum_steps = config.grad_accum_steps(world.size)
        self._world = world
        self._open_loader = open_loader
        self._stop = stop
        self._phases = phases
        self._loader = open_loader(position)
        self._earlier_wait = 0.0  # seconds, of loaders that are closed
        self._is_first_step = True
        self._any_failed = False  # on any rank
        self._error: EcarError | None = None  # of this rank

    def read(self, progress: Progress, ready: bool) -> StepStart:
        """The micro-batches of the step that begins at `progress`. Collective: one small sum over ranks.

        No batches where any rank was asked to stop, or cannot read its data: see `raise_error`. `ready` is another
        flag of this rank that travels in the same sum.

        Raises ConfigError, or RemoteError, where the ranks do not read the same order of samples: it is checked once.
        """
        step = progress.step + 1
        self._phases.enter("data", step)

        # This rank's samples. An error is kept, because the other ranks must learn of it before anybody raises.
        batches = None
        try:
            failpoint("data.take", step)
            batches = self._loader.take(self._grad_accum_steps, lambda: bool(self._stop))
        except EcarError as failure:
            self._error = failure

        # This sum is not one with that of the losses: it decides whether the step begins, which must be known before
        # the first forward pass (under ZeRO-3 a collective), and a loss is known only after the last one.
        flags = [bool(self._stop), self._error is not None, ready]
        sums = self._world.sum(torch.tensor(flags, dtype=torch.float64, device=self._world.device))
        stops, errors, ready_ranks = sums.tolist()
        self._any_failed = errors > 0
        all_ready = ready_ranks == self._world.size
        if stops or errors or batches is None:
            return StepStart(None, all_ready)

        # Once, all ranks prove that they read the same global batch.
        if self._is_first_step:
            check_shares(self._world, self._loader, batches, progress.samples_seen, self._global_batch_size)
            self._is_first_step = False
        return StepStart(batches, all_ready)

    def raise_error(self) -> None:
        """Raise the error that kept a rank from reading: its own on that rank, RemoteError on the others. Collective.

        Does nothing where no rank met one.
        """
        if self._any_failed:
            self._world.agree(self._error)

    def seek(self, position: int) -> None:
        """Go on from another position of the sample order. Collective."""
        self._earlier_wait += self._loader.wait_seconds
        self._loader.close()
        self._loader = self._open_loader(position)

    @property
    def wait_seconds(self) -> float:
        """How long training has waited for data on this rank."""
        return self._earlier_wait + self._loader.wait_seconds

    def traffic(self) -> dict[str, float]:
        """This rank's downloads by tag; empty where nothing was downloaded."""
        counts = [source.traffic() for source in self._loader.sources]
        if not any(count.get("requests") for count in counts):
            return {}
        return {
            "data/downloaded_gib": sum(count["bytes"] for count in counts) / 2**30,
            "data/retries": sum(count["retries"] for count in counts),
        }

    def close(self) -> None:
        self._loader.close()


def check_shares(
    world: World, loader: SampleLoader, batches: Sequence[MicroBatch], start: int, global_batch_size: int
) -> None:
    """The micro-batches of all ranks are together the global batch from position `start` on. Collective.

    Compared are sums of hashes of (position, sample id), so one small sum over ranks will do. Raises ConfigError on
    rank 0 with the ranks that read something else, RemoteError on the others. Nothing to compare where a rank is alone.
    """
    if world.size == 1:
        return

    # What the batch should be, and what each rank should read of it: every world.size-th position.
    positions = np.arange(start, start + global_batch_size)
    ids = loader.stream.locate(positions).sample_ids
    shares = [_sum(positions[rank :: world.size], ids[rank :: world.size]) for rank in range(world.size)]

    # What each rank believes and has read, on all ranks.
    rows = world.of_each(torch.tensor([_sum(positions, ids), _read(batches)]))
    enforce(world, judge_shares(rows, shares, world.nodes, start))


def judge_shares(rows: Sequence[Sequence[int]], shares: Sequence[int], nodes: Sequence[str], start: int) -> Decision:
    """Pure. `rows`: of every rank the hash of the whole batch in its order, and of what it read; `shares`: of what each
    rank should read."""
    batches, read = ([row[column] for row in rows] for column in range(2))

    # Ranks with another order cannot be compared sample by sample.
    if len(set(batches)) > 1:
        who = ranks_on_nodes(odd_ranks(batches) or range(len(batches)), nodes)
        what = "another order of samples" if odd_ranks(batches) else "different orders of samples"
        return Decision(tuple(nodes), problem=f"{who}: {what} from position {start}; {_FIX}")

    # The same order, but somebody read something else.
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
