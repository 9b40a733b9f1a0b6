"""The samples of each step: either all ranks have theirs, or none of them begins the step.

A rank that begins a step alone would wait in its first collective forever, so the ranks agree on each step before it
begins. This must not add a collective and a wait to every step. So samples are taken two steps ahead, and each rank
reports with the losses whether it has them. The flags of step n, which the host reads while the device computes
step n + 1, tell whether step n + 2 can begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

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
from ecar_dist.train.flags import Flags
from ecar_dist.train.time_budget import Phases

AHEAD = 2  # steps whose samples are taken before they begin
_SHARES = int.from_bytes(b"share", "big")  # the purpose of a key
_FIX = "install the same version of ecar_dist on all nodes and start every rank with the same config and data"


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
        """`open_loader(position)` opens a loader at a position in the sample order. It is called with `position`."""
        # Inputs.
        self._total_samples = config.train.total_samples
        self._global_batch_size = config.batch.global_batch_size
        self._grad_accum_steps = config.grad_accum_steps(world.size)
        self._world = world
        self._open_loader = open_loader
        self._stop = stop
        self._phases = phases

        # This rank's samples.
        self._loader = open_loader(position)
        self._earlier_wait = 0.0  # seconds, for loaders that are closed
        self._taken: deque[list[MicroBatch]] = deque()  # of the next steps
        self._error: EcarError | None = None

        # What all ranks know.
        self._is_first_step = True
        self._is_started = False  # whether they have agreed on the first steps from the loader's position on
        self._stopped = False
        self._last_step: int | None = None  # the last one for which all have samples; None: no end is known

    def begin(self, progress: Progress) -> list[MicroBatch] | None:
        """This rank's micro-batches of the step that begins at `progress`. Also takes samples ahead. All ranks call it.

        Returns None on all ranks if one was asked to stop or cannot read its data: see `raise_error`. Collective at the
        start and after `seek`.

        Raises ConfigError, or RemoteError, if the ranks do not read the same order of samples. This is checked once.
        """
        step = progress.step + 1
        self._phases.enter("data", step)
        if not self._is_started:
            self._start(progress)
        if not self.goes_on(progress.step):
            return None

        # The samples of this step, and those of the step after the next.
        batches = self._taken.popleft()
        self._take_ahead(progress.samples_seen + self._global_batch_size, step + 1)
        return batches

    def flags(self, ready: bool) -> Flags:
        """The flags that this rank sends to the others in the step that it has begun. `ready`: as in `Flags`."""
        return Flags(stop=float(bool(self._stop)), failed=float(self._error is not None), ready=float(ready))

    def settle(self, step: int, flags: Flags) -> None:
        """Act on the summed flags of step number `step`. All ranks call it at the same point."""
        if flags.stop:
            self._stopped = True
        if flags.failed and self._last_step is None:
            self._last_step = step + AHEAD - 1

    def goes_on(self, step: int) -> bool:
        """Whether a step can begin after step number `step`, as far as the ranks know by now. The same on all ranks."""
        return not self._stopped and (self._last_step is None or step < self._last_step)

    def _start(self, progress: Progress) -> None:
        """Agree on the first steps: there is no sum of losses yet that could carry flags. Collective."""
        # Whether this rank has the samples of the first step; an error may belong to a later one.
        self._take_ahead(progress.samples_seen, progress.step + 1)
        flags = self.flags(False)
        first_failed = flags.failed and not self._taken
        sums = self._world.sum(self._world.tensor([flags.stop, flags.failed, float(first_failed)]))
        stops, failed, first_failed = sums.tolist()

        # What all ranks know now.
        self._is_started = True
        self._stopped = stops > 0
        if failed:
            self._last_step = progress.step + (0 if first_failed else 1)

        # Check once that all ranks read the same global batch.
        if self._is_first_step and self.goes_on(progress.step):
            check_shares(self._world, self._loader, self._taken[0], progress.samples_seen, self._global_batch_size)
            self._is_first_step = False

    def _take_ahead(self, position: int, step: int) -> None:
        """Take the samples of step number `step`, which begins at `position`, and of the next, unless already done."""
        # Not beyond the end of the run.
        steps_left = -(-(self._total_samples - position) // self._global_batch_size)
        while self._error is None and len(self._taken) < min(AHEAD, steps_left):
            # An error is kept, because the other ranks must know of it before any rank raises.
            try:
                failpoint("data.take", step + len(self._taken))
                batches = self._loader.take(self._grad_accum_steps, lambda: bool(self._stop))
            except EcarError as failure:
                self._error = failure
                return
            if batches is None:  # asked to stop while it waited
                return
            self._taken.append(batches)

    def raise_error(self) -> None:
        """Raise the error that kept a rank from reading: its own on that rank, RemoteError on the others. Collective.

        Does nothing if no rank had one.
        """
        if self._last_step is not None:
            self._world.agree(self._error)

    def seek(self, position: int) -> None:
        """Continue from another position in the sample order. Collective."""
        # Open a new loader.
        self._earlier_wait += self._loader.wait_seconds
        self._loader.close()
        self._loader = self._open_loader(position)

        # Discard what belongs to the old loader. A stop request remains.
        self._taken.clear()
        self._error = None
        self._last_step = None
        self._is_started = False

    @property
    def wait_seconds(self) -> float:
        """How long training has waited for data on this rank."""
        return self._earlier_wait + self._loader.wait_seconds

    def traffic(self) -> dict[str, float]:
        """This rank's downloads by tag; empty if nothing was downloaded."""
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
    """Check that the micro-batches of all ranks together are the global batch from position `start` on. Collective.

    Sums of hashes of (position, sample id) are compared, so one small sum over ranks is enough. Raises ConfigError on
    rank 0, naming the ranks that read something else, RemoteError on the others. A single rank has nothing to compare.
    """
    if world.size == 1:
        return

    # What the batch should be, and which part of it each rank should read.
    positions = np.arange(start, start + global_batch_size)
    ids = loader.stream.locate(positions).sample_ids
    parts = [loader.stream.rank_positions(start, rank, world.size) for rank in range(world.size)]
    shares = [_sum(part, ids[part - start]) for part in parts]

    # What each rank expects and has read, known to all ranks.
    rows = world.of_each(torch.tensor([_sum(positions, ids), _read(batches)]))
    enforce(world, judge_shares(rows, shares, world.nodes, start))


def judge_shares(rows: Sequence[Sequence[int]], shares: Sequence[int], nodes: Sequence[str], start: int) -> Decision:
    """Pure. `rows`: for every rank, the hash of the whole batch in its order and of what it read. `shares`: the hash of
    what each rank should read."""
    batches, read = ([row[column] for row in rows] for column in range(2))

    # Ranks with different orders cannot be compared sample by sample.
    if len(set(batches)) > 1:
        who = ranks_on_nodes(odd_ranks(batches) or range(len(batches)), nodes)
        what = "a different order of samples" if odd_ranks(batches) else "different orders of samples"
        return Decision(tuple(nodes), problem=f"{who}: {what} from position {start}; {_FIX}")

    # The same order, but some rank read something else.
    wrong = [rank for rank, (found, share) in enumerate(zip(read, shares, strict=True)) if found != share]
    if wrong:
        who = ranks_on_nodes(wrong, nodes)
        return Decision(
            tuple(nodes), problem=f"{who} read something other than their share of the batch at {start}; {_FIX}"
        )
    return Decision(tuple(nodes))


def _read(batches: Sequence[MicroBatch]) -> int:
    """The hash of what was read; a substitute counts with the id of the damaged sample that it replaces."""
    positions, ids = (
        np.concatenate(parts) for parts in zip(*((b.positions, b.sample_ids) for b in batches), strict=True)
    )
    meant = {one.position: one.sample_id for batch in batches for one in reversed(batch.substitutions)}
    return _sum(
        positions, np.array([meant.get(at, found) for at, found in zip(positions.tolist(), ids.tolist(), strict=True)])
    )


def _sum(positions: np.ndarray, ids: np.ndarray) -> int:
    """The sum of the pairs' hashes, whatever their order, as an int64."""
    return int(hash_keys(0, _SHARES, positions, ids).sum(dtype=np.uint64).astype(np.int64))
