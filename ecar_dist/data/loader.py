"""Endless micro-batches of stored moments, in the order of `order.py`, read ahead by one thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from ecar_dist.data.manifest import load_manifest
from ecar_dist.data.order import rank_positions, sample_indices
from ecar_dist.data.shard_files import check_presence, local_folder
from ecar_dist.data.shards import LatentShard
from ecar_dist.errors import ConfigError
from ecar_dist.rng import Purpose, uniform


@dataclass(frozen=True)
class MicroBatch:
    """`moments` fp16 [m, *shape], raw as stored; `labels` int64 [m]; `positions` int64 [m] in the run's order."""

    moments: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class LatentLoader:
    """Iterates for ever. In step s, rank r takes positions start + s x global + r + world_size x j, in micro-batches.

    Equal `positions` give equal samples for every world size and micro-batch size, and `start=k` continues any run that
    has seen k samples. Every shard's presence and size is checked at construction; its content when first touched.
    Raises DataError for missing or damaged data, in the consumer, wherever the reading thread met it.
    """

    def __init__(
        self,
        latents: str | Path,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        prefetch: int = 4,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
                f"{micro_batch_size} x {world_size}; change one of the three"
            )
        self.manifest = load_manifest(latents)
        self.wait_seconds = 0.0  # total time the consumer has waited for data
        self._folder = local_folder(latents)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch_size, self._micro_batch_size, self._start = global_batch_size, micro_batch_size, start
        self._firsts = np.array([entry.first_index for entry in self.manifest.shards], dtype=np.int64)
        self._shards: dict[int, LatentShard] = {}
        check_presence(self._folder, self.manifest.shards)
        self._queue: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="latent-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        began = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, MicroBatch):
            return item
        self._queue.put(item)  # the end stays the end for a caller that asks again
        raise StopIteration if item is None else item

    def close(self) -> None:
        """End the reading thread. Safe to call twice."""
        self._stopping.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.01)
        self._drain()
        self._queue.put(None)

    def __enter__(self) -> LatentLoader:
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
            step_start = self._start
            while True:
                positions = rank_positions(step_start, self._global_batch_size, self._rank, self._world_size)
                for micro_positions in positions.reshape(-1, self._micro_batch_size):
                    if self._stopping.is_set():
                        return
                    self._queue.put(self._read(micro_positions))
                step_start += self._global_batch_size
        except BaseException as error:
            self._queue.put(error)

    def _read(self, positions: np.ndarray) -> MicroBatch:
        """Gather a micro-batch shard by shard."""
        indices = sample_indices(positions, self.manifest.count, self._seed)
        at = torch.from_numpy(positions)
        flip = uniform(self._seed, at, Purpose.FLIP).numpy() < 0.5 if self.manifest.has_flip else None
        moments = np.empty((len(indices), *self.manifest.moments_shape), dtype=np.float16)
        labels = np.empty(len(indices), dtype=np.int64)
        owners = np.searchsorted(self._firsts, indices, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            shard, rows = self._shard(int(owner)), indices[places] - self._firsts[owner]
            moments[places] = shard.gather(rows, None if flip is None else flip[places])
            labels[places] = shard.labels[rows]
        return MicroBatch(torch.from_numpy(moments), torch.from_numpy(labels), at)

    def _shard(self, owner: int) -> LatentShard:
        """Open, prove and keep."""
        if owner not in self._shards:
            entry = self.manifest.shards[owner]
            self._shards[owner] = LatentShard(self._folder / entry.name, entry, self.manifest)
        return self._shards[owner]
