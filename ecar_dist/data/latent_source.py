"""A set of latent shards as a source of the loader: rows copied out of mapped, proven shards."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ecar_dist.data.images.dali import NpyDecoder
from ecar_dist.data.order.stream import Places
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.recycled import RecycledArrays
from ecar_dist.data.shards.files import ShardDamaged
from ecar_dist.data.shards.layout import MOMENTS_DTYPE
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import LatentShard
from ecar_dist.data.shards.store import CacheOptions, open_store
from ecar_dist.data.shards.watch import ShardWatch, changed_files
from ecar_dist.errors import DataError

_MAPPED = 256  # shards: each map holds a file descriptor, and many systems give a process 1,024
_TRIES = 3  # of one batch, where files change and are whole again

_Copied = tuple[np.ndarray, np.ndarray]  # moments of the asked places in memory of their own, and labels int64 [n]
_Copy = Callable[[Mapping[int, LatentShard]], _Copied]  # of the open shards


class LatentSource:
    """Raises DataError for a set that is not whole; content is proven when a shard is first touched, and again where
    its file has changed since (`shard_watch.py`)."""

    def __init__(self, folder: str | Path, cache: CacheOptions | None = None) -> None:
        self.manifest = load_manifest(folder)
        self.store = open_store(folder, self.manifest.dataset_id, self.manifest.shards, cache or CacheOptions())
        self.shard_counts = [entry.count for entry in self.manifest.shards]
        self.can_flip = self.manifest.has_flip
        self._arrays = RecycledArrays(MOMENTS_DTYPE)
        self._open: dict[int, LatentShard] = {}
        self._damaged: dict[int, str] = {}  # why; not fetched again at every sample
        self._opened: set[int] = set()  # once, whole
        self.watch = ShardWatch(self.shard_counts, math.prod(self.manifest.moments_shape), self.can_flip)

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw moments fp16 [n, *shape] and labels int64 [n]; where `flip` (bool [n]), those of the mirrored image.

        Raises BadSamples for the places whose shard is damaged, DataError where one is out of reach.
        """
        moments, labels = self.watched(places, flip, lambda shards: self._copy(shards, places, flip))
        return torch.from_numpy(moments), torch.from_numpy(labels)

    def watched(self, places: Places, flip: np.ndarray | None, copy: _Copy) -> _Copied:
        """What `copy` makes of the open shards. It is made again after a change of a file that is whole all the same.

        Raises as `read`.
        """
        due = False
        for _ in range(_TRIES):
            shards = self.open_shards(places)
            due = due or self.watch.is_due()
            if not due:
                return copy(shards)
            copied, changed = self._look(places, flip, shards, copy)
            if copied is not None and not changed:
                return copied
            for owner in changed:
                del self._open[owner]  # to be proven again
        raise DataError(
            f"shard {self.store.where(min(changed))} keeps changing; end what writes there, and start again"
        )

    def _look(
        self, places: Places, flip: np.ndarray | None, shards: Mapping[int, LatentShard], copy: _Copy
    ) -> tuple[_Copied | None, set[int]]:
        """What `copy` makes, if it could be made, and the shards that have changed since their proof."""
        # before the copy: to read a map past the end of a file that was cut would end the process
        began, near = time.perf_counter(), set(places.shards.tolist())
        if cut := {owner for owner in near if shards[owner].is_cut()}:
            return None, cut
        between = time.perf_counter()
        copied = copy(shards)
        # after it: whatever changes now is not in the copy
        after = time.perf_counter()
        changed = changed_files(near, shards) | self.watch.changed_rows(places.shards, places.rows, flip, copied[0])
        self.watch.looked(time.perf_counter() - after + between - began)
        return copied, changed

    def _copy(self, shards: Mapping[int, LatentShard], places: Places, flip: np.ndarray | None) -> _Copied:
        owners, rows = places.shards.tolist(), places.rows.tolist()
        moments = self._arrays.empty((len(places), *self.manifest.moments_shape))
        backs = itertools.repeat(False) if flip is None else flip.tolist()
        # one copy a sample, in one call: the rows of a batch lie in many shards, so there is little for a fancy index
        records = [shards[owner].records[back][row : row + 1] for owner, row, back in zip(owners, rows, backs)]  # noqa: B905
        np.concatenate(records, out=moments.reshape(len(places), -1).view(records[0].dtype).reshape(-1))
        labels = [shards[owner].labels[row] for owner, row in zip(owners, rows, strict=True)]
        return moments, np.array(labels, dtype=np.int64)

    def open_shards(self, places: Places) -> dict[int, LatentShard]:
        """Every shard of these places, proven and mapped."""
        for owner in set(places.shards.tolist()) - self._open.keys():
            if owner not in self._damaged:
                try:
                    self._open[owner] = self._prove(owner)
                except ShardDamaged as error:
                    when = "changed under the run, which had proven it: " if owner in self._opened else ""
                    self._damaged[owner] = f"{when}{error}"
            if owner in self._damaged:
                there = np.flatnonzero(places.shards == owner).tolist()
                raise BadSamples(dict.fromkeys(there, self._damaged[owner]), whole_shards=True)
        return self._open

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """As Source.plan. A proven shard stays mapped, unless its file has changed, the store may evict it, or there
        are too many."""
        for owner in changed_files(self._open, self._open):
            del self._open[owner]
        if self.store.evicts or len(self._open) > _MAPPED:
            near = {*soon, *(owner for owner, place in future.items() if place < 2 * len(soon))}
            self._open = {owner: shard for owner, shard in self._open.items() if owner in near}
        self.store.retire(future)
        self.store.prefetch([owner for owner in soon if owner not in self._open and owner not in self._damaged])

    def traffic(self) -> Mapping[str, float]:
        return self.store.stats.snapshot()

    def close(self) -> None:
        self.store.close()

    def _prove(self, owner: int) -> LatentShard:
        entry = self.manifest.shards[owner]
        shard = LatentShard(self.store.open(owner), self.store.where(owner), entry, self.manifest)
        self.watch.learn(owner, shard)
        self._opened.add(owner)
        return shard


class DaliLatentSource:
    """The same rows through DALI: it decodes the npy members and, with a GPU, returns the moments there."""

    def __init__(self, source: LatentSource, max_batch_size: int, device: torch.device) -> None:
        self.can_flip, self._source = source.can_flip, source
        self._decoder = NpyDecoder(max_batch_size, device)

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As LatentSource.read."""
        mirrored = np.zeros(len(places), dtype=bool) if flip is None else flip
        rows = list(zip(places.shards.tolist(), places.rows.tolist(), mirrored.tolist(), strict=True))
        files: list[np.ndarray] = []  # uint8 [n, bytes of a file], of the last copy

        def copy(shards: Mapping[int, LatentShard]) -> _Copied:
            copied = np.stack([shards[owner].encoded(back)[row] for owner, row, back in rows])
            files[:] = copied
            labels = [shards[owner].labels[row] for owner, row, _ in rows]
            payload = shards[rows[0][0]].moments[0].nbytes  # behind the header of the file
            return copied[:, -payload:], np.array(labels, dtype=np.int64)

        _, labels = self._source.watched(places, flip, copy)
        return self._decoder.decode(files), torch.from_numpy(labels)

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        self._source.plan(soon, future)

    def traffic(self) -> Mapping[str, float]:
        return self._source.traffic()

    def close(self) -> None:
        self._source.close()
