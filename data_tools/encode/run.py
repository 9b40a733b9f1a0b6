"""`ecar-data encode`: image shards -> latent shards. Run again to resume; any number of tasks can share the work."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_tools.encode.commit import CommittedFailures, commit, failures_of, is_committed, marked_shards, recover
from data_tools.encode.plan import EncodePlan, settle_plan
from data_tools.encode.settings import EncodeSettings, resolve_device, warn_if_enlarged
from data_tools.failures import MAX_BAD, Failure, FailureTally, errors_name, write_failures
from data_tools.moments_statistics import FP16_MAX, measure
from data_tools.progress import progress
from ecar_dist.data.images.decode import ImageDecoder, Separated
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.shards.manifest import MANIFEST_NAME
from ecar_dist.data.shards.write import ShardContent
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.daemon_pool import PATIENCE, DaemonPool
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec
from ecar_dist.vae.pixels import from_pixels

_PRINTED = 10  # bad images that are printed as they occur; errors.jsonl lists all


def encode(
    shards: str | Path,
    out: Path,
    *,
    task: int = 0,
    tasks: int = 1,
    batch_size: int = 64,
    max_bad: float = MAX_BAD,
    **settings: Any,
) -> None:
    """Make the shards task, task + tasks, ... of the plan that do not exist yet. `settings`: of EncodeSettings.

    Bad images are left out and listed in a file of this task. Raises DataError if all tasks together have more than
    max_bad x count bad images, if the source is missing or damaged, or if OUT is occupied; ConfigError for settings
    that do not fit.
    """
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is outside 0..{tasks - 1} for --tasks {tasks}; count tasks from 0")
    chosen = EncodeSettings(**settings)
    target = torch.device(resolve_device(chosen.device))
    images = ImageShards(shards)
    codec = chosen.open_codec(target)
    decoder = chosen.open_decoder(target)
    committed = CommittedFailures(out)
    listed = out / errors_name(task, tasks)
    tally = FailureTally(out, len(images), max_bad, committed, listed.name)

    # Write the plan, or resume the existing one.
    drafted = chosen.draft(shards, images, codec.identity, decoder)
    plan = settle_plan(out, drafted, keep_order=chosen.chunk is None)
    todo = [index for index in range(task, plan.num_shards, tasks) if not is_committed(out, index, plan)]
    if todo:
        warn_if_enlarged(images, plan.image_size)
    if plan.background is None:
        print(
            f"{out} was started by a version that dropped transparency, and continues to drop it; "
            "to use --background, encode into a new folder"
        )
        decoder = chosen.open_decoder(target, drop_transparency=True)

    # Encode shard by shard. This task's list of errors is written even if this fails.
    with progress(sum(len(plan.rows(index)) for index in todo), "image", "encode") as bar:
        worker = EncodeWorker(images, decoder, codec, target, batch_size, tally, bar)
        with contextlib.closing(worker):
            try:
                for index in todo:
                    _encode_shard(worker, plan, out, index, committed)
            finally:
                own = range(task, plan.num_shards, tasks)
                failures = failures_of(out, own, {committed.in_work: worker.open_failures})
                # A finalized set has one list of all failures.
                finalized = (out / MANIFEST_NAME).exists()
                failed = len(list(failures)) if finalized else write_failures(listed, failures)

    # Tell the user what this task did and what comes next.
    summary = f"{out}: task {task} of {tasks} is done, {len(todo)} shards by this run"
    summary += f", failed images in its shards: {failed}" + f" ({listed})" * (failed > 0 and not finalized)
    if decoder.animated:
        summary += f", animated or multi-page: {decoder.animated} (the first picture of each is used)"
    print(f"{summary}; {_next_step(out, plan.num_shards, max_bad)}")


def _encode_shard(
    worker: EncodeWorker, plan: EncodePlan, out: Path, shard_index: int, committed: CommittedFailures
) -> None:
    # Another task may have made the shard since this one started, or have died after writing its tar.
    if is_committed(out, shard_index, plan) or recover(out, shard_index, plan):
        return
    committed.begin(shard_index)
    content = worker.encode_shard(plan, shard_index)
    about = {
        "statistics": measure(content.moments, EncoderIdentity.from_dict(plan.encoder)),
        "failures": [dataclasses.asdict(failure) for failure in worker.open_failures],
    }
    commit(out, shard_index, plan, content, about)
    committed.note(shard_index, len(worker.open_failures))
    worker.open_failures = []


def _next_step(out: Path, num_shards: int, max_bad: float) -> str:
    finished = sum(shard_index < num_shards for shard_index in marked_shards(out))
    if finished < num_shards:
        return f"{finished} of {num_shards} shards are finished; other tasks make the rest"
    return f"next: ecar-data finalize {out}" + f" --max-bad {max_bad:g}" * (max_bad != MAX_BAD)


@dataclass(frozen=True)
class _Batch:
    rows: list[int]  # of the plan, in any order
    records: list[ImageRecord]
    decoded: Separated


class EncodeWorker:
    """Encodes shards one after the other. Meanwhile, a thread reads and decodes the next batch.

    `open_failures` are the bad images of the shard in work.
    """

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
        self._images = images
        self._decoder = decoder
        self._codec = codec
        self._device = device
        self._batch_size = batch_size
        self._tally = tally
        self._bar = bar
        self._printed = 0
        self._run: list[Failure] = []  # bad images since the last good one
        self._ahead = DaemonPool(1, "encode-read")

    def encode_shard(self, plan: EncodePlan, shard_index: int) -> ShardContent:
        """Moments and labels of all good images of a shard; the others are in `open_failures`.

        Raises DataError if too many images are bad, if none of the shard is good, or if the source is damaged.
        """
        self.open_failures = []
        encoded = [self._encode(batch, plan) for batch in self._ahead.one_ahead(self._batches(plan, shard_index))]
        rows, straight, mirrored, labels = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        if not len(labels):
            raise DataError(
                f"shard {shard_index:06d} would be empty: none of its {len(plan.rows(shard_index))} images can be "
                f"encoded ({self.open_failures[-1].error}); give a larger --samples-per-shard, or repair the source"
            )

        # Sort from the order of reading to the order of the rows.
        places = np.argsort(rows)
        self.open_failures.sort(key=lambda failure: failure.row)
        missing = tuple(failure.row for failure in self.open_failures)
        flipped = mirrored[places] if plan.has_flip else None
        return ShardContent(plan.rows(shard_index).start, straight[places], labels[places], flipped, missing)

    def close(self) -> None:
        # Closing the images first ends their reads, which would otherwise retry for minutes. A decoder must not be
        # running when the interpreter exits.
        self._images.close()
        self._ahead.end(PATIENCE)

    def _batches(self, plan: EncodePlan, shard_index: int) -> Iterator[_Batch]:
        rows, indices = plan.read_order(shard_index)
        for first in range(0, len(rows), self._batch_size):
            chosen = slice(first, first + self._batch_size)
            records = self._images.read_many(indices[chosen].tolist())
            decoded = self._decoder.separate([record.data for record in records], records, plan.image_size)
            yield _Batch(rows[chosen].tolist(), records, decoded)

    def _encode(self, batch: _Batch, plan: EncodePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the G good images: rows [G], moments, those of mirrored images (fp16 [G, C or 2C, H, W]), labels [G]."""
        # Moments of all images that could be decoded. Only bytes go to the device; they become floats there.
        straight = mirrored = np.empty((0, *plan.moments_shape), np.float32)
        if batch.decoded.good:
            images = from_pixels(torch.from_numpy(batch.decoded.pixels).to(self._device))  # [G, 3, S, S]
            straight = self._codec.encode(images).cpu().numpy()
            mirrored = self._codec.encode(images.flip(-1)).cpu().numpy() if plan.has_flip else straight

        # Images whose moments do not fit fp16 count as bad.
        fits = _fits_fp16(straight) & _fits_fp16(mirrored)
        good = np.array(batch.decoded.good, dtype=np.int64)[fits]
        self._note_failures(batch, frozenset(good.tolist()))
        self._bar.update(len(batch.rows))
        rows = np.array(batch.rows, dtype=np.int64)[good]
        labels = np.array([batch.records[place].label for place in good], dtype=np.int64)
        return rows, straight[fits].astype(np.float16), mirrored[fits].astype(np.float16), labels

    def _note_failures(self, batch: _Batch, good: frozenset[int]) -> None:
        """`good`: positions in the batch. Raises DataError if too many images are bad."""
        for place, (row, record) in enumerate(zip(batch.rows, batch.records, strict=True)):
            if place in good:
                self._run = []
                continue
            stage = "decode"
            error = batch.decoded.failures.get(place)
            if error is None:
                stage = "encode"
                error = (
                    f"moments of image {record.where} are not finite in fp16 (limit {FP16_MAX:.0f}); check the "
                    "autoencoder"
                )
            failure = Failure(row, readable(record.key), readable(record.shard), stage, error, record.name)
            self.open_failures.append(failure)
            self._run.append(failure)
            # The decoders print lines of their own on stderr, without a file name.
            if self._printed < _PRINTED:
                self._printed += 1
                self._bar.write(f"left out: {error}", file=sys.stderr)
        if len(good) < len(batch.rows):
            self._tally.check(self.open_failures)
            self._tally.check_run(self._run)


def _fits_fp16(raw: np.ndarray) -> np.ndarray:
    """Which samples of float32 [B, C, H, W] fit fp16, bool [B]."""
    return (np.abs(raw) <= FP16_MAX).all(axis=(1, 2, 3))  # a NaN compares false
