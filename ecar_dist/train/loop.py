"""The train loop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from ecar_dist.command_line import say
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch, SampleLoader
from ecar_dist.data.order.substitution import Substitution
from ecar_dist.errors import EcarError, FruitlessError, NodeError
from ecar_dist.failpoint import failpoint
from ecar_dist.learning_rate import learning_rate
from ecar_dist.runtime.checkpoint.files import Progress
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.replicas import check_replicas
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.metrics import MetricsWriter
from ecar_dist.runtime.signals import StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.train.bad_step_file import BadStepFile
from ecar_dist.train.bad_steps import BadSteps, Verdict
from ecar_dist.train.phases import Phases
from ecar_dist.train.shares import check_shares
from ecar_dist.train.telemetry import Counters, StepResult, Telemetry, progress_line

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
    phases: Phases
    telemetry: Telemetry
    bad_steps: BadSteps
    bad_step_file: BadStepFile
    open_loader: Callable[[int], SampleLoader]  # at a position of the run's sample order
    stop: StopRequest
    directory: RunDirectory
    replaced_samples: int = 0  # by all ranks since this attempt began
    data_failed: bool = False  # on any rank
    data_error: EcarError | None = None  # of this rank
    writer: MetricsWriter | None = None
    preview: Preview | None = None


def train(run: Training, progress: Progress) -> Progress:
    """Train from `progress` to the end, a stop signal, or data that fail: whichever, the last step is committed."""
    config, batch, saved, due = run.config, run.config.batch.global_batch_size, progress, False
    first_step = progress.step + 1
    run.stop.defer()
    while progress.samples_seen < config.train.total_samples and (batches := next_batches(run, progress.step + 1)):
        begun, progress = progress, Progress(progress.samples_seen + batch, progress.step + 1)
        result = None
        if progress.step == first_step:
            check_shares(run.world, run.loader, batches, begun.samples_seen, batch)
        if run.bad_steps.passes_over(progress.step):
            run.bad_steps.pass_over()
            run.engine.set_optimizer_step(progress.step)
        else:
            result = train_step(run, batches, begun)
            if settle_step(run, batches, begun, result) is Verdict.ROLL_BACK:
                saved = progress = roll_back(run, progress.step)
                continue
        run.ema.update(progress.samples_seen, batch)
        if result and progress.step % config.log.every_steps == 0:
            log(run, progress, result)
        if config.log.tensorboard and crossed(config.sample.every_samples, progress.samples_seen, batch):
            draw_preview(run, progress)
        due = due or crossed(config.checkpoint.every_samples, progress.samples_seen, batch)
        averages = crossed(config.ema.snapshot_every_samples, progress.samples_seen, batch)
        ready = due and not run.bad_steps.in_a_row  # in a row of bad steps the last checkpoint is the one to go back to
        if ready or averages:
            save(run, progress, checkpoint=ready, averages=averages)
            saved, due = (progress, False) if ready else (saved, due)
    if progress.samples_seen >= config.train.total_samples:
        run.stop.mark_complete()
    if saved != progress:
        save(run, progress)
    run.phases.enter("checkpoint", progress.step)
    run.store.finish()
    if run.data_failed:
        run.world.agree(run.data_error)
    say_how_it_went(run, progress)
    return progress


def save(run: Training, progress: Progress, *, checkpoint: bool = True, averages: bool = False) -> None:
    """Begin to write a checkpoint, a copy of the averages alone, or both; training goes on meanwhile.

    Raises NodeError, or RemoteError, on all ranks where their copies of the weights have drifted apart: nothing of this
    step is written then, and the save that is on its way, of an earlier one, stands.
    """
    run.phases.enter("checkpoint", progress.step)
    try:
        check_replicas(run.world, run.engine, run.ema, progress.step)
    except (NodeError, RemoteError):
        finish_save(run)
        raise
    run.store.begin(progress, run.engine, run.ema, notes(run), checkpoint=checkpoint, averages=averages)


def finish_save(run: Training) -> None:
    """Wait for the save that is on its way, where there is one."""
    while run.store.in_flight:
        run.store.settle()


def notes(run: Training) -> dict[str, Any]:
    """What a checkpoint has to carry besides tensors."""
    return {"bad_steps": run.bad_steps.notes(), "goodput": run.telemetry.goodput.notes()}


def next_batches(run: Training, step: int) -> list[MicroBatch] | None:
    """The micro-batches of one step, once every rank has its own: no rank enters a step that another cannot take.

    None on all ranks where any was asked to stop, or where the data of any failed (`run.data_failed`). The same sum
    over ranks tells when all have written their part of a checkpoint.
    """
    batches = None
    run.phases.enter("data", step)
    try:
        failpoint("data.take", step)
        batches = run.loader.take(run.config.grad_accum_steps(run.world.size), lambda: bool(run.stop))
    except EcarError as failure:
        run.data_error = failure
    flags = [bool(run.stop), run.data_error is not None, run.store.ready]
    sums = run.world.sum(torch.tensor(flags, dtype=torch.float64, device=run.world.device))
    stops, errors, written = sums.tolist()
    if written == run.world.size:
        run.store.settle()
    run.data_failed = errors > 0
    return None if stops or errors else batches


def train_step(run: Training, batches: Sequence[MicroBatch], progress: Progress) -> StepResult:
    """Micro-batches: loss and backward; then one engine step, which is refused where any rank's loss is not finite."""
    config, device, step = run.config, run.world.device, progress.step + 1
    rate = learning_rate(
        config.optim, progress.samples_seen + config.batch.global_batch_size, config.train.total_samples
    )
    run.engine.set_learning_rate(rate)
    run.engine.grad_norm_limit = run.bad_steps.grad_norm_limit
    replaced = [one for micro in batches for one in micro.substitutions]
    # of each stage, then of replaced samples
    sums = torch.zeros(config.flow.num_stages + 1, dtype=torch.float64, device=device)
    applied = True
    run.phases.enter("forward", step)
    with run.telemetry.forward_clock:  # a rank that is held up here is a slow rank
        failpoint("train.step", step)
    for micro in batches:
        run.phases.enter("forward", step)
        parts = (micro.values, micro.labels, micro.positions)
        values, labels, positions = (part.to(device, non_blocking=True) for part in parts)
        with run.telemetry.forward_clock:
            loss, per_stage, times = run.engine(values, labels, positions)
        if failpoint("train.loss", step):
            loss, per_stage = loss * math.nan, per_stage * math.nan
        run.telemetry.losses.add(per_stage, times)
        sums[:-1] += per_stage.double().sum(0)
        run.phases.enter("backward", step)
        if micro is batches[-1]:
            sums[-1] = note_substitutions(run, replaced)
            run.world.sum(sums)  # every rank knows the loss before any weight moves
            if not torch.isfinite(sums).all():
                run.engine.refuse_step()
        run.engine.backward(loss)
        run.phases.enter("optimizer", step)
        applied = run.engine.step()
    run.telemetry.end_step(config.batch.global_batch_size, applied)
    *losses, replacements = sums.tolist()
    run.replaced_samples += int(replacements)
    stage_losses = tuple(total / config.batch.global_batch_size for total in losses)
    loss_value = sum(w * value for w, value in zip(config.flow.resolved_stage_weights, stage_losses, strict=True))
    return StepResult(loss_value, stage_losses, run.engine.grad_norm, rate, applied)


def settle_step(run: Training, batches: Sequence[MicroBatch], progress: Progress, result: StepResult) -> Verdict:
    """Judge the step begun at `progress`; a bad one is written down. Raises FruitlessError on all ranks: no more."""
    step, bad = progress.step + 1, run.bad_steps
    reason = bad.fault(result.loss, result.grad_norm) or "the engine refused it"
    verdict = bad.judge(step, result.loss, result.grad_norm, result.applied)
    if verdict is Verdict.FINE:
        return verdict
    ids = [number for micro in batches for number in micro.sample_ids.tolist()]
    run.bad_step_file.note_step(step, progress.samples_seen, result.loss, result.grad_norm, reason, ids)
    if run.world.is_first:
        say(f"step {step} moved no weight: {reason} ({verdict.value})")
    if verdict is Verdict.STOP:
        give_up(
            run,
            f"step {step}: {reason}, and the run was rolled back {len(bad.windows)} times before; see bad_steps.jsonl "
            f"for the samples, lower optim.learning_rate, or allow more by train.bad_steps.stop_after",
        )
    return verdict


def give_up(run: Training, why: str) -> NoReturn:
    """End the run on all ranks, once the save that is on its way stands: it is the one to go back to."""
    finish_save(run)
    error = FruitlessError(why)
    run.world.agree(error)
    raise error


def roll_back(run: Training, step: int) -> Progress:
    """Restore the last checkpoint; the steps around the bad ones, up to `step`, will be passed over. Collective."""
    assert run.bad_steps.window_to_pass is not None
    run.phases.enter("load", step)
    restored = run.store.restore(run.engine, run.ema)
    if restored is None:
        give_up(
            run,
            f"step {step} is bad like those before it, and no checkpoint was made yet; see bad_steps.jsonl for the "
            f"samples, or lower optim.learning_rate",
        )
    run.bad_step_file.note_roll_back(step, run.bad_steps.window_to_pass)
    if run.world.is_first:
        first, last = run.bad_steps.window_to_pass
        say(f"rolled back to step {restored.progress.step}; steps {first} to {last} will be passed over")
    run.bad_steps = BadSteps(run.config.train.bad_steps, restored.notes.get("bad_steps"), run.bad_step_file.windows())
    run.telemetry.goodput.resume(restored.notes.get("goodput", {}))
    waited = run.loader.wait_seconds
    run.loader.close()
    run.loader = run.open_loader(restored.progress.samples_seen)
    run.loader.wait_seconds = waited
    if run.writer:
        run.writer.rewind(restored.progress.step)
    return restored.progress


def note_substitutions(run: Training, made: Sequence[Substitution]) -> int:
    """Write down the samples this rank had to replace in a step (data.on_bad=substitute); their number."""
    if made:
        with open(run.directory.logs / f"substituted.rank-{run.world.rank:05d}.jsonl", "a") as file:
            file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in made)
    return len(made)


def say_how_it_went(run: Training, progress: Progress) -> None:
    if run.writer and (line := run.telemetry.closing_line()):
        run.writer.text("verdict", line, progress.step)
        say(line)


def log(run: Training, progress: Progress, result: StepResult) -> None:
    run.phases.enter("log", progress.step)
    counters = Counters(run.loader.wait_seconds, run.store.stall_seconds, run.store.failures, run.bad_steps.skipped)
    report = run.telemetry.report(result, progress.samples_seen, counters)
    if run.writer is None:
        return
    run.writer.log(progress.step, progress.samples_seen, report.values | data_values(run))
    if report.news:
        run.writer.text("verdict", report.news, progress.step)
    total = run.config.train.total_samples
    say(progress_line(progress.step, last_step(run.config, progress), progress.samples_seen, total, result, report))


def last_step(config: RunConfig, progress: Progress) -> int:
    """The number of the run's last step; the steps up to now may have had batches of another size."""
    left = config.train.total_samples - progress.samples_seen
    return progress.step + max(0, math.ceil(left / config.batch.global_batch_size))


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
    run.phases.enter("preview", progress.step)
    weights = {}
    for name, full in run.engine.gather(run.ema.partitions):
        if run.world.is_first:
            weights[name] = full.cpu()
    if run.writer and run.preview:
        run.writer.image("samples/stages", run.preview(weights), progress.step)


def crossed(every: int, samples_seen: int, batch: int) -> bool:
    """Whether the last `batch` samples took the run past a multiple of `every`; 0 means never."""
    return every > 0 and samples_seen // every > (samples_seen - batch) // every
