"""Decoded batches of the images that an autoencoder is trained on. Some images are held back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.failures import ERRORS_NAME, Failure, FailureTally, write_failures
from ecar_dist.data.images.decode import ImageDecoder
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.errors import DataError
from ecar_dist.vae.pixels import from_pixels

_HELD_BACK = 256  # images that are not trained on, or a tenth of the set if that is less


class Pictures:
    """Batches of decoded images, split into training images and held-back ones."""

    def __init__(
        self,
        shards: ImageShards,
        decoder: ImageDecoder,
        image_size: int,
        device: torch.device,
        seed: int,
        tally: FailureTally,
    ) -> None:
        self.bad: dict[int, Failure] = {}  # by index; they are not read again
        self._shards = shards
        self._decoder = decoder
        self._image_size = image_size
        self._device = device
        self._seed = seed
        self._tally = tally
        if len(shards) < 2:
            raise DataError(f"the set has {len(shards)} image, training needs at least 2, because some are held back")

        # A random choice of images is held back, at least one.
        mixed = sample_indices(np.arange(len(shards)), len(shards), seed)
        number = max(1, min(_HELD_BACK, len(shards) // 10))
        self.held_back = mixed[:number]
        self.training = mixed[number:]

    def load(self, indices: np.ndarray) -> torch.Tensor:
        """Those that can be decoded, float32 [G, 3, S, S] in [-1, 1]. Raises DataError if too many are bad."""
        # Pairs, not a dict: a batch across the end of an epoch may contain an image twice.
        records = [(index, self._shards.read(index)) for index in map(int, indices) if index not in self.bad]
        blobs = [record.data for _, record in records]
        decoded = self._decoder.separate(blobs, [record for _, record in records], self._image_size)
        if decoded.failures:
            self._note_failures(records, decoded.failures)
        return from_pixels(decoded.pixels).to(self._device)

    def held_back_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The held-back images that can be decoded."""
        return self._batches(self.held_back, batch_size)

    def training_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The training images that can be decoded, each once."""
        return self._batches(self.training, batch_size)

    def _batches(self, indices: np.ndarray, batch_size: int) -> Iterator[torch.Tensor]:
        for first in range(0, len(indices), batch_size):
            images = self.load(indices[first : first + batch_size])
            if len(images):
                yield images

    def training_batch(self, step: int, batch_size: int) -> torch.Tensor:
        """The batch of a step. Each epoch has a different order, given by the seed."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return self.load(self.training[sample_indices(positions, len(self.training), self._seed)])

    def recall_bad(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Restore the bad images that an earlier run of the same training has saved in its state."""
        self.bad = {failure["row"]: Failure(**failure) for failure in failures}

    def list_bad(self, folder: Path) -> None:
        """Write errors.jsonl, or remove it if no image is bad."""
        write_failures(folder / ERRORS_NAME, [self.bad[row] for row in sorted(self.bad)])

    def _note_failures(self, records: list[tuple[int, ImageRecord]], failures: dict[int, str]) -> None:
        for place, error in failures.items():
            index, record = records[place]
            self.bad[index] = Failure(index, readable(record.key), readable(record.shard), "decode", error, record.name)
        self._tally.check(list(self.bad.values()))
