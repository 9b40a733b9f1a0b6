"""The sources of the loader: latent shards, the same through DALI, and encoded images. `loader.Source` is the contract.

A latent source copies rows out of memory-mapped shards. A map shows the current content of the file, not the content
that was proven. So `shards/watch.py` checks the rows of a batch, and they are copied again if a file has changed.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ecar_dist.data.images.dali import NpyDecoder
from ecar_dist.data.images.decode import ImageDecoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.order.stream import Locations
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.shards.gather import gather_rows, gather_values
from ecar_dist.data.shards.layout import MOMENTS_DTYPE, ShardLayout
from ecar_dist.data.shards.manifest import Manifest, load_image_manifest, load_manifest
from ecar_dist.data.shards.proof import ShardDamaged
from ecar_dist.data.shards.read import LatentShard
from ecar_dist.data.shards.store import CacheOptions, ShardStore, open_store
from ecar_dist.data.shards.watch import ShardWatch, changed_files
from ecar_dist.errors import DataError
from ecar_dist.storage.remote import is_remote

_MAX_MAPPED = 256  # shards: each map holds a file descriptor, and many systems allow a process 1,024
_MAX_TRIES = 3  # per batch, while its files keep changing
_MAX_FREE_BLOCKS = 16  # as many as the queue of a loader returns at once

_LABELS = 2  # the column of LatentShard.addresses
_LABEL_DTYPE = np.dtype(np.int64)

_Copied = tuple[torch.Tensor, torch.Tensor]  # moments [n, ...] in their own memory, labels int64 [n]
_Copy = Callable[[Mapping[int, LatentShard]], _Copied]  # copies rows out of the open shards


class LatentSource:
    """A set of latent shards, local or behind a URL.

    A shard is proven when it is first used, and again after its file has changed. With `pin_memory` the moments are
    copied into pinned memory at once.

    manifest: that of the folder, if it has been read already. checked: the shards of a local set whose files are
    checked now, all by default. Raises DataError if one of them is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: CacheOptions | None = None,
        *,
        pin_memory: bool = False,
        manifest: Manifest | None = None,
        checked: Iterable[int] | None = None,
    ) -> None:
        cache = cache or CacheOptions()
        self.manifest = manifest or load_manifest(folder, cache.root)
        # The store checks the structure too, so that this happens in the background.
        opened = partial(LatentShard, manifest=self.manifest)
        self.store: ShardStore[LatentShard] = open_store(
            folder, self.manifest.dataset_id, self.manifest.shards, cache, opened, checked
        )
        self.shard_counts = self.manifest.counts
        self.can_flip = self.manifest.has_flip
        self.watch = ShardWatch(self.shard_counts, math.prod(self.manifest.moments_shape), self.can_flip)
        self._stride = ShardLayout.of(1, self.manifest.moments_shape, self.can_flip).stride
        self._arrays = RecycledArrays(MOMENTS_DTYPE)
        self._pin_memory = pin_memory
        self._open: dict[int, LatentShard] = {}  # by shard index
        self._places = np.zeros((len(self.shard_counts), 3), dtype=np.int64)  # LatentShard.addresses; 0 if not open
        self._damaged: dict[int, str] = {}  # the reason; a damaged shard is not downloaded again for each sample
        self._proven: set[int] = set()  # shards that were intact at least once

    def read(self, locations: Locations, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw moments fp16 [n, *shape] and labels int64 [n]; for the mirrored image where `flip` (bool [n]) is set.

        Raises BadSamples for the samples of damaged shards, DataError if a shard cannot be reached.
        """
        return self.watched(locations, flip, lambda _: self._copy(locations, flip))

    def watched(self, locations: Locations, flip: np.ndarray | None, copy: _Copy) -> _Copied:
        """The result of `copy` on the open shards, free of bytes that changed after their proof.

        If a file changed, its shard is proven again and the copy is repeated. Raises as `read` does.
        """
        due = False
        for _ in range(_MAX_TRIES):
            # Checks take a bounded share of the time, see ShardWatch. A retry is always checked.
            shards = self.open_shards(locations)
            due = due or self.watch.is_due()
            if not due:
                return copy(shards)

            copied, changed = self._checked_copy(locations, flip, shards, copy)
            if copied is not None and not changed:
                return copied
            self._close_shards(changed)
        raise DataError(
            f"shard {self.store.where(min(changed))} changed {_MAX_TRIES} times while it was read; "
            "stop the program that writes to it, and start again"
        )

    def _checked_copy(
        self, locations: Locations, flip: np.ndarray | None, shards: Mapping[int, LatentShard], copy: _Copy
    ) -> tuple[_Copied | None, set[int]]:
        """The result of `copy`, and the shards that changed since their proof. None if copying was not safe."""
        # Before the copy: reading a map past the end of a truncated file kills the process with SIGBUS.
        began = time.perf_counter()
        used = set(locations.shards.tolist())
        truncated = {shard_index for shard_index in used if shards[shard_index].is_cut()}
        if truncated:
            return None, truncated
        copy_began = time.perf_counter()

        copied = copy(shards)

        # After the copy: whatever changes from now on is not in it.
        copy_ended = time.perf_counter()
        changed = changed_files(used, shards)
        changed |= self.watch.changed_rows(locations.shards, locations.rows, flip, copied[0].numpy())
        self.watch.checked(time.perf_counter() - copy_ended + copy_began - began)
        return copied, changed

    def _copy(self, locations: Locations, flip: np.ndarray | None) -> _Copied:
        # The address of each row and each label in memory. [n]
        sides = 0 if flip is None else flip.astype(np.int64)
        rows = self._places[locations.shards, sides] + locations.rows * self._stride
        labels = self._places[locations.shards, _LABELS] + locations.rows * _LABEL_DTYPE.itemsize

        moments = self._empty_moments(len(locations))
        gather_rows(rows, moments.view(len(locations), -1))
        return moments, torch.from_numpy(gather_values(labels, _LABEL_DTYPE))

    def _empty_moments(self, count: int) -> torch.Tensor:
        """Memory for `count` samples: fp16 [count, *shape]. It is reused only when nothing reads it any more."""
        # torch's allocator of pinned memory also waits for the copies to a GPU that were started from it.
        shape = (count, *self.manifest.moments_shape)
        if self._pin_memory:
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        return torch.from_numpy(self._arrays.empty(shape))

    def open_shards(self, locations: Locations) -> dict[int, LatentShard]:
        """Prove and map every shard of these locations. Returns all open shards by index. Raises as `read` does."""
        closed = locations.shards[self._places[locations.shards, 0] == 0]
        for shard_index in sorted(set(closed.tolist())):
            if shard_index not in self._damaged:
                try:
                    self._open[shard_index] = self._prove(shard_index)
                    self._places[shard_index] = self._open[shard_index].addresses
                except ShardDamaged as error:
                    changed = "changed during the run, after it was checked: " if shard_index in self._proven else ""
                    self._damaged[shard_index] = f"{changed}{error}"

            # Every sample of a damaged shard is bad, so the loader can replace them together.
            if shard_index in self._damaged:
                bad = np.flatnonzero(locations.shards == shard_index).tolist()
                raise BadSamples(dict.fromkeys(bad, self._damaged[shard_index]), whole_shards=True)
        return self._open

    def _close_shards(self, shard_indices: Collection[int]) -> None:
        """Unmap these shards. `open_shards` proves them again."""
        for shard_index in shard_indices:
            del self._open[shard_index]
            self._places[shard_index] = 0
            self.watch.forget(shard_index)

    def _prove(self, shard_index: int) -> LatentShard:
        shard = self.store.open(shard_index)
        self.watch.learn(shard_index, shard)
        self._proven.add(shard_index)
        return shard

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """As Source.plan. Unmaps shards that changed, that the store may evict, or that are too many to keep."""
        # A changed shard is proven again in the background, before it is used.
        self._close_shards(changed_files(self._open, self._open))

        # A map keeps the disk space of an evicted file in use, and a file descriptor open.
        if self.store.evicts or len(self._open) > _MAX_MAPPED:
            needed = _needed_soon(soon, future)
            self._close_shards(self._open.keys() - needed)

        # Make room before requesting more.
        self.store.retire(future)
        self.store.prefetch([index for index in soon if index not in self._open and index not in self._damaged])

    def traffic(self) -> Mapping[str, float]:
        return self.store.stats.snapshot()

    def close(self) -> None:
        self.store.close()


class DaliLatentSource:
    """The rows of a LatentSource through DALI, which decodes the npy members and returns the moments on `device`."""

    def __init__(self, source: LatentSource, max_batch_size: int, device: torch.device) -> None:
        self.can_flip = source.can_flip
        self._source = source
        self._decoder = NpyDecoder(max_batch_size, device)

    def read(self, locations: Locations, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As LatentSource.read."""
        mirrored = np.zeros(len(locations), dtype=bool) if flip is None else flip
        picked = list(zip(locations.shards.tolist(), locations.rows.tolist(), mirrored.tolist(), strict=True))
        files: list[np.ndarray] = []  # the npy files of the last copy, uint8 [bytes of one file] each

        def copy(shards: Mapping[int, LatentShard]) -> _Copied:
            copied = np.stack([shards[owner].encoded(side)[row] for owner, row, side in picked])  # [n, bytes]
            files[:] = copied
            labels = [shards[owner].labels[row] for owner, row, _ in picked]
            # The watch compares moments, which are the end of each file, after the npy header.
            payload_bytes = shards[picked[0][0]].moments[0].nbytes
            return torch.from_numpy(copied[:, -payload_bytes:]), torch.tensor(labels)

        _, labels = self._source.watched(locations, flip, copy)
        return self._decoder.decode(files), labels

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        self._source.plan(soon, future)

    def traffic(self) -> Mapping[str, float]:
        return self._source.traffic()

    def close(self) -> None:
        self._source.close()


class ImageSource:
    """Encoded images, decoded, resized and cropped to `image_size`; the run's own autoencoder encodes them later.

    Tars behind a URL are read through the node's cache. Other images are read directly.
    """

    def __init__(
        self,
        folder: str | Path,
        decoder: ImageDecoder,
        image_size: int,
        *,
        flip: bool,
        cache: CacheOptions | None = None,
    ) -> None:
        # Only complete tars can go through the cache.
        manifest = load_image_manifest(folder)
        home = manifest.home(folder)
        self._store = None
        if is_remote(home) and manifest.in_tars:
            self._store = open_store(home, manifest.dataset_id, manifest.shards, cache or CacheOptions())
        self._images = ImageShards(folder, self._store)
        self._first_index = np.array([entry.first_index for entry in manifest.shards], dtype=np.int64)  # [shards]
        self._decoder = decoder
        self._image_size = image_size
        self.can_flip = flip

    def read(self, locations: Locations, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels uint8 [n, S, S, 3] and labels int64 [n]; mirrored where `flip` (bool [n]) is set.

        Raises BadSamples for images that cannot be decoded, DataError if an image cannot be read.
        """
        sample_indices = self._first_index[locations.shards] + locations.rows
        records = self._images.read_many(sample_indices.tolist())
        decoded = self._decoder.separate([record.data for record in records], records, self._image_size)
        if decoded.failures:
            raise BadSamples(decoded.failures, whole_shards=False)

        pixels = decoded.pixels  # [n, S, S, 3]
        if flip is not None:
            pixels[flip] = pixels[flip, :, ::-1]
        labels = np.array([record.label for record in records], dtype=np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(labels)

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """As Source.plan. Without a store there is nothing to download ahead."""
        self._images.forget(_needed_soon(soon, future))
        if self._store is not None:
            self._store.retire(future)
            self._store.prefetch(soon)

    def traffic(self) -> Mapping[str, float]:
        reader = self._images if self._store is None else self._store
        return reader.stats.snapshot()

    def close(self) -> None:
        self._images.close()
        if self._store is not None:
            self._store.close()


def _needed_soon(soon: Sequence[int], future: Mapping[int, int]) -> set[int]:
    """The shards to keep mapped: those of `soon`, and the next 2 len(soon) shards that this node uses."""
    return {*soon, *(shard_index for shard_index, rank in future.items() if rank < 2 * len(soon))}


class RecycledArrays:
    """Arrays of one dtype that reuse the memory of earlier ones after their last view is gone.

    New memory costs a page fault for each page. For a batch of a few megabytes, that took as long as the copy into it.
    Arrays may be dropped in any thread.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """As np.empty."""
        size = math.prod(shape)
        block = self._free.pop() if self._free else np.empty(size, self._dtype)
        if block.size < size:
            block = np.empty(size, self._dtype)

        # A numpy view of an array keeps the array that owns the memory alive, not the view it was made from. An array
        # made from a buffer has no such owner: all later views keep `lent` alive.
        lent = np.frombuffer(block.data, self._dtype, size)
        weakref.finalize(lent, self._take_back, block).atexit = False
        return lent.reshape(shape)

    def _take_back(self, block: np.ndarray) -> None:
        if len(self._free) < _MAX_FREE_BLOCKS:
            self._free.append(block)
