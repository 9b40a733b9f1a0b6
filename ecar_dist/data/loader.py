"""Endless micro-batches in the order of `order/stream.py`, read ahead by one thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from ecar_dist.config.batch import grad_accum_steps
from ecar_dist.data.order.stream import Locations, SampleStream
from ecar_dist.data.order.substitution import BadSamples, Substitutes, Substitution
from ecar_dist.rng import Purpose, uniform

# Positions of this rank that are located together. The cost is mostly in the numpy calls, not in the samples.
_MAX_BLOCK = 16384

# How often a waiting consumer calls `give_up`.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class MicroBatch:
    """`values`: raw moments fp16 [m, *shape], or pixels uint8 [m, S, S, 3]. All other tensors: int64 [m].

    `positions` are positions of the run's order, `sample_ids` number the samples of all sources.
    `substitutions` lists the bad samples of this batch that were replaced (only with `max_bad`).
    """

    values: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    sample_ids: torch.Tensor
    substitutions: tuple[Substitution, ...] = ()


class Source(Protocol):
    """A data set that the loader reads from. See `data/sources.py`."""

    @property
    def can_flip(self) -> bool:
        """Whether half of the samples are to be mirrored."""
        ...

    def read(self, locations: Locations, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [n, ...] and labels int64 [n]; mirrored where `flip` (bool [n]) is set.

        Raises BadSamples for samples that cannot be used, DataError for any other failure.
        """
        ...

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """Prefetch the shards of `soon` in that order, and release others.

        `future` maps each shard that this node still needs to its rank in the order of next use (0 is next).
        """
        ...

    def traffic(self) -> Mapping[str, float]:
        """Network counters, as TransferStats.snapshot()."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """This rank's part of every global batch. `node_ranks` are the ranks that share its node and its cache.

    Raises ConfigError if the global batch cannot be divided into whole micro-batches.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    node_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Called only for its check.
        grad_accum_steps(self.global_batch_size, self.micro_batch_size, self.world_size)


class SampleLoader:
    """An endless iterator of micro-batches.

    In step s, rank r reads the positions start + s * global_batch_size + r + j * world_size for j = 0, 1, ..., in
    micro-batches. Equal positions give equal samples for every world size and micro-batch size, so `start=k` continues
    any run that has seen k samples.

    Errors of the reading thread are raised in the consumer, mostly DataError. The loader owns and closes its sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        stream: SampleStream,
        share: Share,
        *,
        seed: int,
        start: int = 0,
        prefetch: int = 2,
        max_bad: float = 0.0,
        pin_memory: bool = False,
    ) -> None:
        self.sources = sources
        self.stream = stream
        self.wait_seconds = 0.0  # total time that the consumer has waited for data
        self._share = share
        self._seed = seed
        self._start = start
        self._pin_memory = pin_memory
        self._substitutes = Substitutes(stream, seed, max_bad)

        # The queue holds micro-batches; an exception or None ends the iteration.
        self._queue: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(maxsize=prefetch)

        # One thread, because the batches must come in the order of their positions.
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="sample-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        taken = self.take(1)
        assert taken is not None
        return taken[0]

    def take(self, count: int, give_up: Callable[[], bool] = lambda: False) -> list[MicroBatch] | None:
        """The next `count` micro-batches; None if `give_up` returned true while waiting for them."""
        taken: list[MicroBatch] = []
        began = time.perf_counter()
        try:
            # Wait in short steps, so that `give_up` is called even if the reading thread is stuck.
            while len(taken) < count:
                try:
                    item = self._queue.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    if give_up():
                        return None
                    continue

                # Put the end marker back into the queue, so that the next call sees it too.
                if not isinstance(item, MicroBatch):
                    self._queue.put(item)
                    raise StopIteration if item is None else item
                taken.append(item)
            return taken
        finally:
            self.wait_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Stop the reading thread and close the sources. Safe to call twice."""
        # Close the sources first: this ends a download that the thread may be waiting for, perhaps for minutes.
        self._stopping.set()
        for source in self.sources:
            source.close()

        # The thread may be waiting for room in the queue until it sees that it has to stop.
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.01)
        self._drain()
        self._queue.put(None)

    def __enter__(self) -> SampleLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _read_ahead(self) -> None:
        """The reading thread: every error goes to the consumer."""
        try:
            for block in self._blocks():
                # A step is a whole number of micro-batches, so none is cut at the end of a block.
                for first in range(0, len(block), self._share.micro_batch_size):
                    if self._stopping.is_set():
                        return
                    locations = block.take(slice(first, first + self._share.micro_batch_size))
                    self._queue.put(self._read(locations))
        except BaseException as error:
            self._queue.put(error)

    def _blocks(self) -> Iterator[Locations]:
        """Locations of this rank, in blocks of whole steps. Plans the shards before each block."""
        # A block is at most half a window, and each plan looks a whole window ahead. So a shard is requested at least
        # half a window before its first use.
        share = self._share
        block = min(_MAX_BLOCK * share.world_size, self.stream.window // 2)
        steps = max(1, block // share.global_batch_size)

        at = self._start
        while True:
            end = at + steps * share.global_batch_size
            self._plan_shards(at, max(at + self.stream.window, end + share.global_batch_size))
            starts = range(at, end, share.global_batch_size)
            yield self.stream.locate(self.stream.positions_of_steps(starts, share.rank, share.world_size))
            at = end

    def _plan_shards(self, at: int, soon: int) -> None:
        """Tell each source which shards this rank needs up to position `soon`, and which its node needs later."""
        # Soon: one window ahead, for this rank. Later: one epoch ahead, for all ranks that share the node's cache.
        share = self._share
        node_ranks = share.node_ranks or (share.rank,)
        rank_shards = self.stream.upcoming(at, soon, [share.rank], share.world_size)
        node_shards = self.stream.upcoming(at, at + self.stream.count, node_ranks, share.world_size)
        for source, of_rank, of_node in zip(self.sources, rank_shards, node_shards, strict=True):
            source.plan(of_rank, {shard: use for use, shard in enumerate(of_node)})

    def _read(self, locations: Locations) -> MicroBatch:
        """The micro-batch of these locations, with bad samples replaced until all are good."""
        while True:
            try:
                values, labels = self._read_once(locations)
            except BadSamples as error:
                locations = self._substitutes.replace(locations, error)
                continue

            # The sample ids stay on the host.
            positions = self._pinned(torch.from_numpy(locations.positions))
            sample_ids = torch.from_numpy(locations.sample_ids)
            made = self._substitutes.take()
            return MicroBatch(self._pinned(values), self._pinned(labels), positions, sample_ids, made)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in pinned memory, so that its copy to a GPU overlaps with computation."""
        # A tensor that is pinned already is not copied.
        return tensor.pin_memory() if self._pin_memory and tensor.device.type == "cpu" else tensor

    def _read_once(self, locations: Locations) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [m, ...] and labels [m]: each source reads its samples, which are put into their own rows."""
        # Most micro-batches come from one source, and need no second copy.
        used = [0] if len(self.sources) == 1 else np.unique(locations.sources).tolist()
        if len(used) == 1:
            return self._read_from(used[0], locations)

        values = None
        labels = torch.empty(len(locations), dtype=torch.int64)
        for number in used:
            rows = np.flatnonzero(locations.sources == number)
            try:
                part, labels[rows] = self._read_from(number, locations.take(rows))
            except BadSamples as error:
                # The indices are relative to the part; the caller needs them relative to the micro-batch.
                reasons = {int(rows[index]): reason for index, reason in error.reasons.items()}
                raise BadSamples(reasons, whole_shards=error.whole_shards) from None

            # The first part determines shape, dtype and device.
            if values is None:
                values = part.new_empty((len(locations), *part.shape[1:]))
            values[rows] = part
        assert values is not None
        return values, labels

    def _read_from(self, number: int, locations: Locations) -> tuple[torch.Tensor, torch.Tensor]:
        """Read from one source. Whether a sample is mirrored is keyed by its position, like all randomness of a run."""
        # A draw per position, so a sample is mirrored in some epochs and not in others.
        source = self.sources[number]
        flip = None
        if source.can_flip:
            flip = uniform(self._seed, torch.from_numpy(locations.positions), Purpose.FLIP).numpy() < 0.5
        return source.read(locations, flip)
