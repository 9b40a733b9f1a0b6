"""What a run records: its attempts, the first lines of its log, and what happens while it trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ecar_dist.command_line import counted, say
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.errors import CheckpointError, EcarError, FruitlessError
from ecar_dist.runtime.checkpoint.files import step_of
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.restore import Restored
from ecar_dist.runtime.checkpoint.storage import CheckpointStorage, open_storage, storage_at
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.peers import lost_peer
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.drift import resume_lines
from ecar_dist.runtime.run.metrics import PREVIEW, MetricsWriter
from ecar_dist.runtime.signals import StoppedEarlyError, StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.storage.redaction import redact_text
from ecar_dist.storage.remote import is_remote
from ecar_dist.train.sources import MAX_LOOKED_UP, TrainingData
from ecar_dist.train.telemetry import Counters, StepResult, Telemetry, progress_line


class Preview(Protocol):
    """Draws samples with a model, and makes a picture of them."""

    def draw(self, model: nn.Module) -> list[torch.Tensor]:
        """Every stage of a few samples. The same on all ranks."""
        ...

    def picture(self, stages: list[torch.Tensor]) -> np.ndarray:
        """uint8 [H, W, 3]. Rank 0 has the autoencoder."""
        ...


class Recorder:
    """Records what happens while a run trains. All ranks make the same calls; rank 0 writes the metrics and the log."""

    def __init__(
        self,
        *,
        config: RunConfig,
        world: World,
        logs: Path,
        telemetry: Telemetry,
        counters: Callable[[], Counters],
        writer: MetricsWriter | None,
        preview: Preview | None,
    ) -> None:
        """`logs`: the folder for each rank's own log. `writer` is rank 0's, and None on the others."""
        self._config = config
        self._world = world
        self._logs = logs
        self._telemetry = telemetry
        self._counters = counters
        self._writer = writer
        self._preview = preview
        self._replaced_samples = 0  # by all ranks since this attempt began

    def note_replaced(self, batches: Sequence[MicroBatch], replaced_samples: int) -> None:
        """Record the samples that this rank had to replace in a step (data.on_bad=substitute).

        `replaced_samples`: how many samples all ranks together have replaced in it.
        """
        self._replaced_samples += replaced_samples

        # Each rank has its own file, so no rank waits for another.
        substitutions = [one for micro in batches for one in micro.substitutions]
        if substitutions:
            with open(self._logs / f"substituted.rank-{self._world.rank:05d}.jsonl", "a") as file:
                file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in substitutions)

    def log(self, progress: Progress, result: StepResult, validated: Mapping[str, float] = {}) -> None:
        """Log metrics and print a line after a step. `validated`: the validation loss by tag. Collective."""
        self._telemetry.phases.enter("log", progress.step)
        counters = self._counters()
        report = self._telemetry.report(result, progress.samples_seen, counters)
        if self._writer is None:
            return

        # Metrics of all ranks; the downloads are rank 0's.
        values = {**report.values, **validated, **counters.downloads}
        if self._replaced_samples:
            values["data/replaced_samples"] = float(self._replaced_samples)
        self._writer.log(progress.step, progress.samples_seen, values)
        if report.news:
            self._writer.text("verdict", report.news, progress.step)

        # The line on the screen.
        total_samples = self._config.train.total_samples
        total_steps = last_step(self._config, progress)
        line = progress_line(progress.step, total_steps, progress.samples_seen, total_samples, result, report)
        if validated:
            line += f"  validation {validated['eval/loss']:.4f} (EMA {validated['eval/loss_ema']:.4f})"
        say(line)

    def draw_preview(self, progress: Progress, engine: Engine, ema: ShardedEma) -> None:
        """Draw a strip of all stages with the EMA weights. Collective."""
        self._telemetry.phases.enter("preview", progress.step)
        if self._preview is None:
            return

        # The trained model draws. Only rank 0 uses the result; if the weights are sharded, all ranks have to draw.
        with engine.weights_of(ema.partitions) as model:
            stages = self._preview.draw(model) if self._world.is_first or engine.splits_weights else []
        if self._writer:
            self._writer.image(PREVIEW, self._preview.picture(stages), progress.step)

    def rewind(self, step: int) -> None:
        """The run was rolled back to `step`: drop the metrics after it."""
        if self._writer:
            self._writer.rewind(step)

    def close(self, progress: Progress) -> None:
        """Report how the attempt went, if it was long enough."""
        if self._writer and (line := self._telemetry.closing_line()):
            self._writer.text("verdict", line, progress.step)
            say(line)


def last_step(config: RunConfig, progress: Progress) -> int:
    """The number of the run's last step. The steps so far may have had a different batch size."""
    left = config.train.total_samples - progress.samples_seen
    return progress.step + max(0, math.ceil(left / config.batch.global_batch_size))


def open_attempt(directory: RunDirectory, config: RunConfig, world: World) -> tuple[str, str]:
    """Rank 0: claim the run directory, and record this attempt. Returns the names of the attempt and the run.

    Raises CheckpointError if the config's folder has no checkpoints, or older ones than the run has elsewhere: the run
    would silently start over.
    """
    directory.open_for_training()

    # Where this attempt's checkpoints are, and where the last attempt's were.
    storage = open_storage(config)
    found, attempts = storage.committed(), directory.attempts()
    where = storage.where if is_remote(storage.where) else str(Path(storage.where).absolute())
    before = (attempts[-1].get("checkpoints") or where) if attempts else where

    # A run that has trained must not lose its checkpoints because its config names a different folder.
    if before != where and directory.metrics.exists() and directory.metrics.stat().st_size:
        newest = step_of(found[0]) if found else None
        left = newest_step_at(config, before)
        if newest is None or (left is not None and left > newest):
            ours = "no checkpoint" if newest is None else f"checkpoints up to step {newest}"
            theirs = "" if left is None else f", up to step {left},"
            raise CheckpointError(
                f"{where} has {ours}, but those of the last attempt{theirs} are in {before}; set checkpoint.dir back, "
                f"copy them, or choose another run.name to start over"
            )

    # If the record is lost, the run id is recovered from the run's own checkpoints. Those elsewhere need --adopt.
    lost = directory.record_lost and where == str(directory.checkpoints.absolute())
    lost_name = {"run": name} if lost and (name := run_of(storage, found)) else {}
    attempt = directory.begin_attempt(
        world_size=world.size,
        zero_stage=config.deepspeed.zero_stage,
        device=world.device.type,
        checkpoints=where,
        newest_step=step_of(found[0]) if found else None,
        **lost_name,
    )
    return attempt, directory.run_id


def run_of(storage: CheckpointStorage, found: Sequence[str]) -> str | None:
    """The id of the run that wrote these checkpoints, from the newest that can be read; None if none can."""
    for name in found:
        with contextlib.suppress(OSError, EcarError):
            return storage.manifest(name).run
    return None


def newest_step_at(config: RunConfig, where: str) -> int | None:
    """The newest step in a storage that the run no longer uses; None if it has no checkpoint or cannot be read."""
    try:
        found = storage_at(config, where).committed()
    except (OSError, EcarError):
        return None
    return step_of(found[0]) if found else None


def end_attempt(
    directory: RunDirectory,
    stop: StopRequest,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Record how the attempt ended. Does nothing on the ranks that have not recorded one."""
    # The loss of a peer after a stop was requested is part of the stop.
    lost = error is not None and lost_peer(error) is not None
    if isinstance(error, StoppedEarlyError) or (stop and (error is None or lost)):
        reason = "signal"
    elif lost:
        reason = "failed: another rank was lost"
    else:
        verb = "gave up" if isinstance(error, FruitlessError) else "failed"
        reason = redact_text(f"{verb}: {error}") if error else "done"

    # A full disk must not hide the error that ended the attempt.
    with contextlib.suppress(OSError):
        directory.end_attempt(reason)


def changes_on_resume(config: RunConfig, directory: RunDirectory, data: TrainingData, restored: Restored) -> list[str]:
    """A line for each change since the checkpoint was made: the layout, the order of the data, the config."""
    attempts = [one for one in directory.attempts() if "dataset_ids" in one]
    same_data = bool(attempts) and attempts[-1]["dataset_ids"] == data.dataset_ids
    lines = [f"resuming {restored.path}: {restored.conversion}"] if restored.conversion else []
    lines += [restored.new_data_order] if restored.new_data_order else []
    return lines + resume_lines(directory.config, config, same_data=same_data)


def unreachable_half_lives(config: RunConfig) -> list[str]:
    """A line if the run is too short for an EMA's half-life: the ramp-up then caps it until the end."""
    cap = config.ema.rampup * config.train.total_samples
    above = [half_life for half_life in config.ema.half_life_samples if half_life > cap]
    if not above:
        return []
    line = (
        f"ema.half_life_samples={', '.join(map(str, above))}: capped at {cap:,.0f} by the end, since a half-life is at "
        f"most ema.rampup={config.ema.rampup:g} of the samples seen"
    )
    return [line]


def opening_lines(
    config: RunConfig,
    world: World,
    *,
    data: TrainingData,
    precision: str,
    parameters: int,
    batch_spread: float,
    progress: Progress,
) -> list[str]:
    """The arithmetic of the run. `batch_spread`: about how many shards a global batch comes from."""
    # The values in the lines.
    batch = config.batch
    ranks = counted(world.size, "rank")
    shards = counted(sum(len(manifest.shards) for manifest in data.manifests), "shard")
    tokens = f"{' + '.join(map(str, config.stage_tokens))} tokens in {config.flow.num_stages} stages"
    model = f"{config.model.kind} {config.model.preset}, {parameters / 1e6:.2f} M parameters"
    samples = "samples" if data.encoder else "images, encoded on the fly"
    total = config.train.total_samples
    resuming = f"resuming at step {progress.step:,} ({progress.samples_seen:,} samples)"
    layout = f"{ranks} on {world.device.type}, ZeRO-{config.deepspeed.zero_stage}, {precision}"
    product = f"{batch.micro_batch_size} x {config.grad_accum_steps(world.size)} x {ranks}"
    epochs = f"{total:,} samples to see = {total / data.count:.1f} epochs, {last_step(config, progress):,} steps"
    looked_up = ""
    if data.encoder and any(len(manifest.shards) > MAX_LOOKED_UP for manifest in data.manifests):
        looked_up = f"; each rank has looked up at most its next {MAX_LOOKED_UP:,} shards, not all"
    return [
        f"run {config.run_directory}: {model}, {tokens}",
        f"{layout}; global batch {batch.global_batch_size} = {product}",
        f"data {data.count:,} {samples}, a global batch from about {batch_spread:.0f} of {shards}{looked_up}",
        f"{epochs}; {resuming if progress.samples_seen else 'from the start'}",
    ]
