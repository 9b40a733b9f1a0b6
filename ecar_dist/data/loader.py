"""Endless micro-batches in the order of `stream.py`, read ahead by one thread."""

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
from ecar_dist.data.order.lanes import rank_positions
from ecar_dist.data.order.stream import Places, SampleStream
from ecar_dist.data.order.substitution import BadSamples, Substitutes, Substitution
from ecar_dist.rng import Purpose, uniform

_BLOCK = 16384  # positions whose places are worked out at once: the order costs numpy calls, not samples

_POLL_SECONDS = 0.2  # between two looks at whether the consumer still wants to wait


@dataclass(frozen=True)
class MicroBatch:
    """`values`: raw moments fp16 [m, *shape], or pixels uint8 [m, S, S, 3]; all else is int64 [m].

    `positions` are places in the run's order; `sample_ids` say which sample of which source, as one number.
    `substitutions` lists the bad samples among them that were replaced (only with `max_bad`).
    """

    values: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    sample_ids: torch.Tensor
    substitutions: tuple[Substitution, ...] = ()


class Source(Protocol):
    """Samples in shards behind one way of reading them."""

    @property
    def can_flip(self) -> bool:
        """Whether half the samples are to be mirrored."""
        ...

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and labels. Raises BadSamples for samples that cannot be used, DataError for all else."""
        ...

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """Bring the shards of `soon`, in that order, and let go of others: `future` has the place of each shard in the
        order in which this node will next use it; an absent one is not needed here."""
        ...

    def traffic(self) -> Mapping[str, float]:
        """Counters of what came over the network, as TransferStats.snapshot()."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """This rank's part of every global batch, and the ranks that share its node and so its cache."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    node_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        grad_accum_steps(self.global_batch_size, self.micro_batch_size, self.world_size)  # raises where they do not fit


class SampleLoader:
    """Iterates for ever. In step s, rank r takes positions start + s x global + r + world_size x j, in micro-batches.

    Equal `positions` give equal samples for every world size and micro-batch size, and `start=k` continues any run that
    has seen k samples. Raises DataError in the consumer, wherever the reading thread met it. Owns its sources.
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
        self.stream, self.sources = stream, sources
        self.wait_seconds = 0.0  # total time the consumer has waited for data
        self._share, self._seed, self._start, self._pin_memory = share, seed, start, pin_memory
        self._substitutes = Substitutes(stream, seed, max_bad)
        self._queue: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(maxsize=prefetch)
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
        """The next `count` micro-batches; None where `give_up` turned true while they were awaited."""
        taken: list[MicroBatch] = []
        began = time.perf_counter()
        try:
            while len(taken) < count:
                try:
                    item = self._queue.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    if give_up():
                        return None
                    continue
                if not isinstance(item, MicroBatch):
                    self._queue.put(item)  # the end stays the end for a caller that asks again
                    raise StopIteration if item is None else item
                taken.append(item)
            return taken
        finally:
            self.wait_seconds += time.perf_counter() - began

    def close(self) -> None:
        """End the reading thread and close the sources. Safe to call twice."""
        self._stopping.set()
        for source in self.sources:  # first: it ends a download that the thread would wait for, perhaps for minutes
            source.close()
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
        try:
            for places in self._blocks():
                for first in range(0, len(places), self._share.micro_batch_size):
                    if self._stopping.is_set():
                        return
                    self._queue.put(self._read(places.take(slice(first, first + self._share.micro_batch_size))))
        except BaseException as error:
            self._queue.put(error)

    def _blocks(self) -> Iterator[Places]:
        """Places of this rank's next whole steps, some thousands at a time; shards are fetched and dropped by plan."""
        share, at = self._share, self._start
        # two plans a window, so that no position finds its shard only just asked for
        steps = max(1, min(_BLOCK * share.world_size, self.stream.window // 2) // share.global_batch_size)
        while True:
            end = at + steps * share.global_batch_size
            self._plan_shards(at, max(at + self.stream.window, end + share.global_batch_size))
            yield self.stream.locate(rank_positions(at, end - at, share.rank, share.world_size))
            at = end

    def _plan_shards(self, at: int, soon: int) -> None:
        """What comes next is known exactly: this rank's shards up to `soon`, and all that the node needs for long."""
        share = self._share
        first = at % share.world_size  # a rank's positions keep their remainder, which starts here
        mine = self.stream.upcoming(at, soon, [(first + share.rank) % share.world_size], share.world_size)
        node = [(first + rank) % share.world_size for rank in share.node_ranks or (share.rank,)]
        later = self.stream.upcoming(at, at + self.stream.count, node, share.world_size)
        for source, soon_shards, node_shards in zip(self.sources, mine, later, strict=True):
            source.plan(soon_shards, {shard: place for place, shard in enumerate(node_shards)})

    def _read(self, places: Places) -> MicroBatch:
        while True:
            try:
                values, labels = self._read_once(places)
            except BadSamples as error:
                places = self._substitutes.replace(places, error)
                continue
            positions, sample_ids = torch.from_numpy(places.positions), torch.from_numpy(places.sample_ids)
            if self._pin_memory and values.device.type == "cpu":
                values = values.pin_memory()
            return MicroBatch(values, labels, positions, sample_ids, self._substitutes.take())

    def _read_once(self, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Each source reads its own part, and the parts are laid back into their places."""
        chosen = [0] if len(self.sources) == 1 else np.unique(places.sources).tolist()
        if len(chosen) == 1:
            return self._read_from(chosen[0], places)
        values, labels = None, torch.empty(len(places), dtype=torch.int64)
        for number in chosen:
            at = np.flatnonzero(places.sources == number)
            try:
                part, labels[at] = self._read_from(number, places.take(at))
            except BadSamples as error:
                reasons = {int(at[i]): why for i, why in error.reasons.items()}
                raise BadSamples(reasons, whole_shards=error.whole_shards) from None
            values = part.new_empty((len(places), *part.shape[1:])) if values is None else values
            values[at] = part
        assert values is not None
        return values, labels

    def _read_from(self, number: int, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        source, flip = self.sources[number], None
        if source.can_flip:
            flip = uniform(self._seed, torch.from_numpy(places.positions), Purpose.FLIP).numpy() < 0.5
        return source.read(places, flip)
