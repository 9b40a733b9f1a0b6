"""The train loop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ecar_dist.config import RunConfig
from ecar_dist.data.loader import MicroBatch, SampleLoader
from ecar_dist.data.substitution import Substitution
from ecar_dist.errors import EcarError, TrainingError
from ecar_dist.runtime.checkpoint import CheckpointStore
from ecar_dist.runtime.checkpoint_files import Progress
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.metrics import MetricsWriter
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.train.learning_rate import learning_rate
from ecar_dist.train.telemetry import StepResult, Telemetry, progress_line

Preview = Callable[[dict[str, torch.Tensor]], np.ndarray]  # full EMA weights -> picture, uint8 [H, W, 3]


@dataclass
class Training:
    """All parts of one attempt at a run; `writer` and `preview` are rank 0's alone."""

    config: RunConfig
    world: World
    engine: Engine
    ema: ShardedEma
    store: CheckpointStore
    loader: SampleLoader
    telemetry: Telemetry
    stop: StopRequest
    directory: RunDirectory
    replaced_samples: int = 0  # by all ranks since this attempt began
    writer: MetricsWriter | None = None
    preview: Preview | None = None


def train(run: Training, progress: Progress) -> Progress:
    """Train from `progress` to the end, or to a stop signal. Either way the last step is committed."""
    config, batch, saved = run.config, run.config.batch.global_batch_size, progress
    run.stop.defer()
    while progress.samples_seen < config.train.total_samples and (batches := next_batches(run)):
        result = train_step(run, batches, progress)
        progress = Progress(progress.samples_seen + batch, progress.step + 1)
        run.ema.update(progress.samples_seen, batch)
        if progress.step % config.log.every_steps == 0:
            log(run, progress, result)
        if config.log.tensorboard and crossed(config.sample.every_samples, progress.samples_seen, batch):
            draw_preview(run, progress)
        if crossed(config.checkpoint.every_samples, progress.samples_seen, batch):
            run.store.save(progress, run.engine, run.ema)
            saved = progress
    if saved != progress:
        run.store.save(progress, run.engine, run.ema)
    return progress


def next_batches(run: Training) -> list[MicroBatch] | None:
    """The micro-batches of one step, once every rank has its own: no rank enters a step that another cannot take.

    None on all ranks where any was asked to stop; on all ranks an error where the data of any failed.
    """
    batches, error = None, None
    try:
        batches = run.loader.take(run.config.grad_accum_steps(run.world.size), lambda: bool(run.stop))
    except EcarError as failure:
        error = failure
    flags = torch.tensor([bool(run.stop), error is not None], dtype=torch.float64, device=run.world.device)
    stops, errors = run.world.sum(flags).tolist()
    if errors:
        run.world.agree(error)
    return None if stops else batches


def train_step(run: Training, batches: Sequence[MicroBatch], progress: Progress) -> StepResult:
    """Micro-batches: loss and backward; then one engine step. Raises TrainingError on all ranks if it is not finite."""
    config, device = run.config, run.world.device
    rate = learning_rate(
        config.optim, progress.samples_seen + config.batch.global_batch_size, config.train.total_samples
    )
    run.engine.set_learning_rate(rate)
    replaced = [one for micro in batches for one in micro.substitutions]
    # of each stage, then of replaced samples
    sums = torch.zeros(config.flow.num_stages + 1, dtype=torch.float64, device=device)
    for micro in batches:
        parts = (micro.values, micro.labels, micro.positions)
        values, labels, positions = (part.to(device, non_blocking=True) for part in parts)
        loss, per_stage = run.engine(values, labels, positions)
        run.engine.backward(loss)
        sums[:-1] += per_stage.double().sum(0)
        if micro is batches[-1]:
            sums[-1] = note_substitutions(run, replaced)
            run.world.sum(sums)  # every rank knows the loss before any weight moves
            _refuse_non_finite(run.world, "loss", bool(torch.isfinite(sums).all()), progress)
        run.engine.step()
    _refuse_non_finite(run.world, "gradient norm", math.isfinite(run.engine.grad_norm), progress)
    *losses, replacements = sums.tolist()
    run.replaced_samples += int(replacements)
    stage_losses = tuple(total / config.batch.global_batch_size for total in losses)
    loss_value = sum(w * value for w, value in zip(config.flow.resolved_stage_weights, stage_losses, strict=True))
    return StepResult(loss_value, stage_losses, run.engine.grad_norm, rate)


def note_substitutions(run: Training, made: Sequence[Substitution]) -> int:
    """Write down the samples this rank had to replace in a step (data.on_bad=substitute); their number."""
    if made:
        with open(run.directory.logs / f"substituted.rank-{run.world.rank:05d}.jsonl", "a") as file:
            file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in made)
    return len(made)


def _refuse_non_finite(world: World, what: str, finite: bool, progress: Progress) -> None:
    """Both numbers are the same on all ranks, so all stop here, and nothing is saved from this step on."""
    if not finite:
        error = TrainingError(
            f"the {what} of step {progress.step + 1} (samples from {progress.samples_seen}) is not finite; the last "
            f"checkpoint is whole: lower optim.learning_rate or set deepspeed.precision=fp32, and run again"
        )
        world.agree(error)


def log(run: Training, progress: Progress, result: StepResult) -> None:
    values = run.telemetry.report(result, progress.samples_seen, run.loader.wait_seconds)
    values |= data_values(run)
    if run.writer is None:
        return
    run.writer.log(progress.step, progress.samples_seen, values)
    config = run.config
    print(
        progress_line(progress.step, config.total_steps, progress.samples_seen, config.train.total_samples, values),
        flush=True,
    )


def data_values(run: Training) -> dict[str, float]:
    """How the data came, where there is something to say: replaced samples of all ranks, rank 0's downloads."""
    values = {"data/replaced_samples": float(run.replaced_samples)} if run.replaced_samples else {}
    counts = [source.traffic() for source in run.loader.sources]
    if any(count.get("requests") for count in counts):
        values["data/downloaded_gib"] = sum(count["bytes"] for count in counts) / 2**30
        values["data/retries"] = sum(count["retries"] for count in counts)
    return values


def draw_preview(run: Training, progress: Progress) -> None:
    """Rank 0 draws a strip of all stages with the EMA weights; the others only help to gather them."""
    weights = {}
    for name, full in run.engine.gather(run.ema.partitions):
        if run.world.is_first:
            weights[name] = full.cpu()
    if run.writer and run.preview:
        run.writer.image("samples/stages", run.preview(weights), progress.step)


def crossed(every: int, samples_seen: int, batch: int) -> bool:
    """Whether the last `batch` samples took the run past a multiple of `every`; 0 means never."""
    return every > 0 and samples_seen // every > (samples_seen - batch) // every
