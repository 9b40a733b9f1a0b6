"""Images in, one shard's moments out: reading and decoding a batch ahead of the autoencoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_tools.encode.failures import FailureTally
from data_tools.encode.markers import Failure
from data_tools.encode.plan import EncodePlan
from data_tools.moments_statistics import FP16_MAX
from ecar_dist.data.images.decode import ImageDecoder, Separated
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.shards.write import ShardContent
from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import PATIENCE, DaemonPool
from ecar_dist.vae.codec import LatentCodec
from ecar_dist.vae.pixels import from_pixels

_SAID = 10  # bad images that are named as they are met; all are in the list of errors


@dataclass(frozen=True)
class _Batch:
    rows: list[int]  # of the plan
    records: list[ImageRecord]
    decoded: Separated


class EncodeWorker:
    """What encoding a shard needs and no shard owns. `open_failures` are those of the shard that is being made."""

    def __init__(
        self,
        images: ImageShards,
        decoder: ImageDecoder,
        codec: LatentCodec,
        device: torch.device,
        batch_size: int,
        tally: FailureTally,
        bar: tqdm[Any],
    ) -> None:
        self.open_failures: list[Failure] = []
        self._images, self._decoder, self._codec, self._device = images, decoder, codec, device
        self._batch_size, self._tally, self._bar = batch_size, tally, bar
        self._said = 0
        self._run: list[Failure] = []  # without a good image between them
        self._ahead = DaemonPool(1, "encode-read")

    def encode_shard(self, plan: EncodePlan, shard_index: int) -> ShardContent:
        """All samples of a shard that can be had; `open_failures` are the others.

        Raises DataError for too many failures, for a shard that would be empty, and for a source that is damaged.
        """
        self.open_failures = []
        encoded = [self._encode(batch, plan) for batch in self._ahead.one_ahead(self._batches(plan, shard_index))]
        straight, mirrored, labels = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        if not len(labels):
            raise DataError(
                f"shard {shard_index:06d} would be empty: none of its {len(plan.rows(shard_index))} images can be "
                f"encoded ({self.open_failures[-1].error}); take a larger --samples-per-shard, or repair the source"
            )
        missing = tuple(failure.row for failure in self.open_failures)
        first_row = plan.rows(shard_index).start
        return ShardContent(first_row, straight, labels, mirrored if plan.has_flip else None, missing)

    def close(self) -> None:
        """End the reading ahead, and with it the images: their reads retry for minutes."""
        self._images.close()
        self._ahead.end(PATIENCE)  # a decoder in the middle of its work must not meet the interpreter's end

    def _batches(self, plan: EncodePlan, shard_index: int) -> Iterator[_Batch]:
        rows, indices = plan.rows(shard_index), plan.source_indices(shard_index)
        for first in range(0, len(rows), self._batch_size):
            chosen = slice(first, first + self._batch_size)
            records = self._images.read_many(indices[chosen].tolist())
            decoded = self._decoder.separate([record.data for record in records], records, plan.image_size)
            yield _Batch(list(rows[chosen]), records, decoded)

    def _encode(self, batch: _Batch, plan: EncodePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments and moments of the mirrored images, fp16 [G, *shape], and labels of what is good after all."""
        decoded, shape = batch.decoded, plan.moments_shape
        straight = mirrored = np.empty((0, *shape), np.float32)
        if decoded.good:
            images = from_pixels(torch.from_numpy(decoded.pixels).to(self._device))  # bytes travel, floats do not
            straight = self._codec.encode(images).cpu().numpy()
            mirrored = self._codec.encode(images.flip(-1)).cpu().numpy() if plan.has_flip else straight
        fits = _fits_fp16(straight) & _fits_fp16(mirrored)
        good = np.array(decoded.good, dtype=np.int64)[fits]
        self._note(batch, frozenset(good.tolist()))
        self._bar.update(len(batch.rows))
        labels = np.array([batch.records[place].label for place in good], dtype=np.int64)
        return straight[fits].astype(np.float16), mirrored[fits].astype(np.float16), labels

    def _note(self, batch: _Batch, good: frozenset[int]) -> None:
        """List the bad images of a batch. Raises DataError where they are too many."""
        for place, (row, record) in enumerate(zip(batch.rows, batch.records, strict=True)):
            if place in good:
                self._run = []
                continue
            stage, error = "decode", batch.decoded.failures.get(place)
            if error is None:
                stage = "encode"
                error = (
                    f"moments of image {record.where} are not finite in fp16 (limit {FP16_MAX:.0f}); check the "
                    "autoencoder"
                )
            failure = Failure(row, readable(record.key), readable(record.shard), stage, error, record.name)
            self.open_failures.append(failure)
            if self._said < _SAID:  # the decoders' own lines on stderr name no file
                self._said += 1
                self._bar.write(f"left out: {error}", file=sys.stderr)
            self._run.append(failure)
        if len(good) < len(batch.rows):
            self._tally.check(self.open_failures)
            self._tally.check_run(self._run)


def _fits_fp16(raw: np.ndarray) -> np.ndarray:
    """Which samples of float32 [B, C, h, w] fp16 can hold, bool [B]."""
    return (np.abs(raw) <= FP16_MAX).all(axis=(1, 2, 3))  # a NaN compares false
