"""Encoded images as a source of the loader: decoded, resized and cropped on the way, for an autoencoder in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ecar_dist.data.images.decode import ImageDecoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.order.stream import Places
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.data.shards.store import CacheOptions, open_store
from ecar_dist.storage.remote import is_remote


class ImageSource:
    """Pixels uint8 [n, S, S, 3] and labels; tars behind a URL come through the node's cache."""

    def __init__(
        self,
        folder: str | Path,
        decoder: ImageDecoder,
        image_size: int,
        *,
        flip: bool,
        cache: CacheOptions | None = None,
    ) -> None:
        manifest, self._store, self.can_flip = load_image_manifest(folder), None, flip
        home = manifest.home(folder)
        if is_remote(home) and manifest.in_tars:
            self._store = open_store(home, manifest.dataset_id, manifest.shards, cache or CacheOptions())
        self._images, self._decoder, self._image_size = ImageShards(folder, self._store), decoder, image_size
        self._firsts = np.array([entry.first_index for entry in manifest.shards], dtype=np.int64)

    def read(self, places: Places, flip: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises BadSamples for images that cannot be decoded."""
        records = self._images.read_many((self._firsts[places.shards] + places.rows).tolist())
        decoded = self._decoder.separate([record.data for record in records], records, self._image_size)
        if decoded.failures:
            raise BadSamples(decoded.failures, whole_shards=False)
        pixels = decoded.pixels
        if flip is not None:
            pixels[flip] = pixels[flip, :, ::-1]
        labels = np.array([record.label for record in records], dtype=np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(labels)

    def plan(self, soon: Sequence[int], future: Mapping[int, int]) -> None:
        """As Source.plan. Local images, and images that are files of their own, are read where they are."""
        self._images.forget({*soon, *(owner for owner, place in future.items() if place < 2 * len(soon))})
        if self._store is not None:
            self._store.retire(future)
            self._store.prefetch(soon)

    def traffic(self) -> Mapping[str, float]:
        return (self._images if self._store is None else self._store).stats.snapshot()

    def close(self) -> None:
        self._images.close()
        if self._store is not None:
            self._store.close()
