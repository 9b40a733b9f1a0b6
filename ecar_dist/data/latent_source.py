"""A set of latent shards as a source of the loader: rows copied out of mapped, proven shards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ecar_dist.data.dali import NpyDecoder
from ecar_dist.data.manifest import load_manifest
from ecar_dist.data.recycled import RecycledArrays
from ecar_dist.data.shard_files import ShardDamaged
from ecar_dist.data.shard_layout import MOMENTS_DTYPE
from ecar_dist.data.shard_store import CacheOptions, open_store
from ecar_dist.data.shards import LatentShard
from ecar_dist.data.stream import Places
from ecar_dist.data.substitution import BadSamples

_MAPPED = 256  # shards: each map holds a file descriptor, and many systems give a process 1,024


class LatentSource:
    """Raises DataError for a set that is not whole; content is proven when a shard is first touched."""

    def __init__(self, folder: str | Path, cache: CacheOptions | None = None) -> None:
        self.manifest = load_manifest(folder)
        self.store = open_store(folder, self.manifest.dataset_id, self.manifest.shards, cache or CacheOptions())
        self.shard_counts = [entry.count for entry in self.manifest.shards]
        self.can_flip = self.manifest.has_flip
        self._arrays = RecycledArrays(MOMENTS_DTYPE)
        self._open: dict[int, LatentShard] = {}
        self._damaged: dict[int, str] = {}  # why; not fetched again at every sample

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw moments fp16 [n, *shape] and labels int64 [n]; where `flip` (bool [n]), those of the mirrored image.

        Raises BadSamples for the places whose shard is damaged, DataError where one is out of reach.
        """
        shards = self.open_shards(places)
        owners, rows = places.shards.tolist(), places.rows.tolist()
        moments = self._arrays.empty((len(places), *self.manifest.moments_shape))
        backs = itertools.repeat(False) if flip is None else flip.tolist()
        # one copy a sample, in one call: the rows of a batch lie in many shards, so there is little for a fancy index
        records = [shards[owner].records[back][row : row + 1] for owner, row, back in zip(owners, rows, backs)]  # noqa: B905
        np.concatenate(records, out=moments.reshape(len(places), -1).view(records[0].dtype).reshape(-1))
        labels = [shards[owner].labels[row] for owner, row in zip(owners, rows, strict=True)]
        return torch.from_numpy(moments), torch.from_numpy(np.array(labels, dtype=np.int64))

    def open_shards(self, places: Places) -> dict[int, LatentShard]:
        """Every shard of these places, proven and mapped."""
        for owner in set(places.shards.tolist()) - self._open.keys():
            if owner not in self._damaged:
                try:
                    self._open[owner] = self._prove(owner)
                except ShardDamaged as error:
                    self._damaged[owner] = str(error)
            if owner in self._damaged:
                there = np.flatnonzero(places.shards == owner).tolist()
                raise BadSamples(dict.fromkeys(there, self._damaged[owner]), whole_shards=True)
        return self._open

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """As Source.plan. A proven shard stays mapped, unless the store may evict its file, or there are too many."""
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
        return LatentShard(self.store.open(owner), self.store.where(owner), self.manifest.shards[owner], self.manifest)


class DaliLatentSource:
    """The same rows through DALI: it decodes the npy members and, with a GPU, returns the moments there."""

    def __init__(self, source: LatentSource, max_batch_size: int, device: torch.device) -> None:
        self.can_flip, self._source = source.can_flip, source
        self._decoder = NpyDecoder(max_batch_size, device)

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As LatentSource.read."""
        shards = self._source.open_shards(places)
        mirrored = np.zeros(len(places), dtype=bool) if flip is None else flip
        rows = list(zip(places.shards.tolist(), places.rows.tolist(), mirrored.tolist(), strict=True))
        moments = self._decoder.decode([shards[owner].encoded(back)[row] for owner, row, back in rows])
        labels = [shards[owner].labels[row] for owner, row, _ in rows]
        return moments, torch.from_numpy(np.array(labels, dtype=np.int64))

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        self._source.plan(soon, future)

    def traffic(self) -> Mapping[str, float]:
        return self._source.traffic()

    def close(self) -> None:
        self._source.close()
