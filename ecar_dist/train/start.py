"""Build every part of a training run, in the order in which they can fail: cheap checks first, allocations last."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from ecar_dist.command_line import say
from ecar_dist.config import RunConfig
from ecar_dist.data.loader import SampleLoader
from ecar_dist.data.stream import SampleStream
from ecar_dist.errors import CheckpointError, ConfigError, EcarError
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.models.build import build_model, weight_decay_groups
from ecar_dist.runtime.checkpoint import CheckpointStore
from ecar_dist.runtime.checkpoint_files import Progress, step_of
from ecar_dist.runtime.checkpoint_place import open_place, place_at
from ecar_dist.runtime.checkpoint_restore import Restored
from ecar_dist.runtime.drift import resume_lines
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.metrics import MetricsWriter
from ecar_dist.runtime.peers import lost_peer
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StoppedEarlyError, StopRequest
from ecar_dist.runtime.watchdog import Watchdog
from ecar_dist.runtime.world import World
from ecar_dist.storage.remote import is_remote
from ecar_dist.train.bad_step_file import BadStepFile
from ecar_dist.train.bad_steps import BadSteps
from ecar_dist.train.goodput import began
from ecar_dist.train.loop import Preview, Training, last_step
from ecar_dist.train.objective import FlowObjective, Normalise
from ecar_dist.train.phases import Phases
from ecar_dist.train.sources import TrainingData, check_codec, check_data, normaliser, open_loader, open_stream
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import LatentCodec

PreviewFactory = Callable[[RunConfig, LatentCodec, torch.device], Preview]


def start_training(
    config: RunConfig,
    world: World,
    ends: contextlib.ExitStack,
    *,
    training_flops_per_sample: float,
    preview_factory: PreviewFactory,
    allow_new_data: bool = False,
    adopt: bool = False,
) -> tuple[Training, Progress]:
    """Everything `train` needs, and the progress to go on from; what is to be closed is put into `ends`.

    Raises EcarError, on all ranks, before any step.
    """
    stop = StopRequest()
    world.together(lambda: config.grad_accum_steps(world.size))
    directory = RunDirectory(config.run_directory)
    data = world.together(lambda: check_data(config))
    stream = world.together(lambda: open_stream(config, data))
    precision = config.precision_on(world.device.type)
    codec = world.together(lambda: run_codec(config, data, world, precision))
    attempt, run_id = world.broadcast(world.on_first_rank(lambda: open_attempt(directory, config, world)))
    watchdog = ends.enter_context(Watchdog(directory.logs / "watchdog", world, config.train.hang_seconds, attempt))
    ends.push(partial(end_attempt, directory, stop))
    phases = Phases(watchdog.beat)
    world.together(lambda: check_accumulation(config, world, precision))
    engine = build_engine(config, normaliser(data, codec), world, precision)
    ema = ShardedEma(engine.partitions, config.ema)
    identity = run_identity(config, data, stream, codec)
    store = CheckpointStore(
        config,
        world,
        identity,
        run_id=run_id,
        still_ours=directory.is_ours,
        allow_new_data=allow_new_data,
        adopt=adopt,
    )
    ends.callback(store.close)
    phases.enter("load", 0)
    restored = store.restore(engine, ema)
    progress, notes = (restored.progress, restored.notes) if restored else (Progress(), {})
    phases.enter("start", progress.step)
    open_at = partial(open_together, config, world, stream)
    telemetry = Telemetry(config, world, phases, training_flops_per_sample, notes.get("goodput"))
    bad_step_file = BadStepFile(directory.path / "bad_steps.jsonl", world)
    bad_steps = BadSteps(config.train.bad_steps, notes.get("bad_steps"), bad_step_file.windows())
    loader = open_at(progress.samples_seen)
    run = Training(
        config, world, engine, ema, store, loader, phases, telemetry, bad_steps, bad_step_file, open_at, stop, directory
    )
    ends.callback(lambda: run.loader.close())  # a roll-back opens another one
    world.on_first_rank(lambda: begin_record(run, data, precision, restored))
    if run.writer:
        ends.callback(run.writer.close)
    if config.sample.every_samples and config.log.tensorboard:
        run.preview = world.on_first_rank(lambda: preview_factory(config, cast(LatentCodec, codec), world.device))
    return run, progress


def open_together(config: RunConfig, world: World, stream: SampleStream, position: int) -> SampleLoader:
    """Every rank's loader at a position of the run's sample order. Raises on all ranks where one cannot open it."""
    return world.together(lambda: open_loader(config, world, stream, position))


def open_attempt(directory: RunDirectory, config: RunConfig, world: World) -> tuple[str, str]:
    """Rank 0: the run directory is this process's, and what it starts is on record. Names of the attempt, the run."""
    directory.open_for_training()
    place = open_place(config)
    found, attempts = place.committed(), directory.attempts()
    where = place.where if is_remote(place.where) else str(Path(place.where).absolute())
    before = attempts[-1].get("checkpoints", where) if attempts else where
    if before != where and directory.metrics.exists() and directory.metrics.stat().st_size:
        newest, left = (step_of(found[0]) if found else None), newest_step_at(config, before)
        if newest is None or (left is not None and left > newest):
            held = "no checkpoint" if newest is None else f"checkpoints up to step {newest}"
            theirs = "its own" if left is None else f"its own up to step {left}"
            raise CheckpointError(
                f"{where} holds {held}, and the last attempt kept {theirs} in {before}; set checkpoint.dir back, bring "
                f"them over, or choose another run.name to train anew"
            )
    attempt = directory.begin_attempt(
        world_size=world.size,
        zero_stage=config.deepspeed.zero_stage,
        device=world.device.type,
        checkpoints=where,
        newest_step=step_of(found[0]) if found else None,
    )
    return attempt, directory.run_id


def newest_step_at(config: RunConfig, where: str) -> int | None:
    """Of the checkpoints at a place that is no longer the run's; None where there are none, or nobody can tell."""
    try:
        found = place_at(config, where).committed()
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
    """How the attempt ended goes on record, where it lives to tell. Without effect on the ranks that began none."""
    lost = error is not None and lost_peer(error) is not None
    if isinstance(error, StoppedEarlyError) or (stop and (error is None or lost)):
        reason = "signal"
    elif lost:
        reason = "failed: another rank was lost"
    else:
        reason = f"failed: {error}" if error else "done"
    with contextlib.suppress(OSError):
        directory.end_attempt(reason)


def begin_record(run: Training, data: TrainingData, precision: str, restored: Restored | None) -> None:
    """Rank 0: from here on the run is this config's, and its curves go on from here."""
    config, directory = run.config, run.directory
    progress = restored.progress if restored else Progress()
    said = resume_notes(run, data, restored) if restored else []
    directory.note_attempt(
        dataset_ids=data.dataset_ids, precision=precision, resumed_from_step=restored and restored.progress.step
    )
    directory.write_config(config)
    run.telemetry.goodput.run_began = began(directory.attempts())
    run.writer = MetricsWriter(directory, progress.step, config.log.tensorboard)
    warning = run.store.space_warning(run.engine)
    said += [
        f"steps {a} to {b} are passed over, as bad_steps.jsonl says" for a, b in run.bad_steps.ahead(progress.step)
    ]
    say("\n".join([*opening_lines(run, data, precision, progress), *said, *unreachable_half_lives(config)]))
    if warning:
        print(warning, file=sys.stderr)


def unreachable_half_lives(config: RunConfig) -> list[str]:
    """A line where an average's half-life is one that the run is too short for: its ramp-up caps it to the end."""
    cap = config.ema.rampup * config.train.total_samples
    above = [half_life for half_life in config.ema.half_life_samples if half_life > cap]
    if not above:
        return []
    line = (
        f"ema.half_life_samples={', '.join(map(str, above))}: capped at {cap:,.0f} by the end, since a half-life is at "
        f"most ema.rampup={config.ema.rampup:g} of the samples seen"
    )
    return [line]


def resume_notes(run: Training, data: TrainingData, restored: Restored) -> list[str]:
    """What is not as it was when the checkpoint was made: the layout, the order of the data, the config."""
    attempts = [one for one in run.directory.attempts() if "dataset_ids" in one]
    same_data = bool(attempts) and attempts[-1]["dataset_ids"] == data.dataset_ids
    said = [f"resuming {restored.path}: {restored.conversion}"] if restored.conversion else []
    said += [restored.new_data_order] if restored.new_data_order else []
    return said + resume_lines(run.directory.config, run.config, same_data=same_data)


def run_codec(config: RunConfig, data: TrainingData, world: World, precision: str) -> LatentCodec | None:
    """The config's autoencoder: on every rank's device where it encodes images, else on rank 0, to be compared."""
    if data.encoder is not None and not world.is_first:
        return None
    encodes = data.encoder is None
    dtype = torch.bfloat16 if encodes and precision == "bf16" else torch.float32
    codec = open_codec(config.vae, world.device if encodes else "cpu", dtype)
    check_codec(config, data, codec)
    return codec


def check_accumulation(config: RunConfig, world: World, precision: str) -> None:
    """Raises ConfigError where DeepSpeed would add up micro-batches in bf16."""
    if config.deepspeed.zero_stage == 0 and precision == "bf16" and config.grad_accum_steps(world.size) > 1:
        raise ConfigError(
            "deepspeed.zero_stage=0 with bf16 sums gradients over micro-batches in bf16; "
            "use deepspeed.zero_stage=1, or precision=fp32, or one micro-batch per rank and step"
        )


def build_engine(config: RunConfig, normalise: Normalise, world: World, precision: str) -> Engine:
    """The model, from the run's seed alone, the objective around it, and DeepSpeed around both."""
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    torch.manual_seed(config.run.seed)
    model = build_model(config, schedule.context_scales(config.flow.context.tau))
    objective = FlowObjective(model, schedule, normalise, config, precision)
    decay, no_decay = weight_decay_groups(model)
    groups = [
        {"params": decay, "weight_decay": config.optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return Engine(objective, model, groups, config, world, precision)


def run_identity(
    config: RunConfig, data: TrainingData, stream: SampleStream, codec: LatentCodec | None
) -> dict[str, dict[str, Any]]:
    """What must not change while a run goes on: what the weights mean, and the order of the data."""
    encoder = data.encoder or (codec and codec.identity)
    return {
        "model": {
            **config.model_identity,
            "data.resize": config.data.resize,
            "encoder.weights_sha256": encoder and encoder.weights_sha256,
        },
        "data": {
            "run.seed": config.run.seed,
            "dataset_ids": data.dataset_ids,
            **{f"data_order.{name}": value for name, value in stream.describe().items()},
            "data.flip_images": config.data.flip_images,
        },
    }


def opening_lines(run: Training, data: TrainingData, precision: str, progress: Progress) -> list[str]:
    """The arithmetic of the run, said once."""
    config, world = run.config, run.world
    batch, accumulate = config.batch, config.grad_accum_steps(world.size)
    parameters = sum(torch.Size(shape).numel() for shape in run.engine.shapes.values())
    tokens = f"{' + '.join(map(str, config.stage_tokens))} tokens in {config.flow.num_stages} stages"
    model = f"{config.model.kind} {config.model.preset}, {parameters / 1e6:.2f} M parameters"
    total, seen = config.train.total_samples, progress.samples_seen
    spread = run.loader.stream.batch_spread()
    return [
        f"run {config.run_directory}: {model}, {tokens}",
        (
            f"{world.size} ranks on {world.device.type}, ZeRO-{config.deepspeed.zero_stage}, {precision}; global batch "
            f"{batch.global_batch_size} = {batch.micro_batch_size} x {accumulate} x {world.size} ranks"
        ),
        (
            f"data {data.count:,} {'samples' if data.encoder else 'images, encoded on the way'}, a global batch from "
            f"about {spread:.0f} of {sum(len(manifest.shards) for manifest in data.manifests)} shards"
        ),
        f"{total:,} samples to see = {total / data.count:.1f} epochs, {last_step(config, progress):,} steps; "
        + (f"resuming at step {progress.step:,} ({seen:,} samples)" if seen else "from the start"),
    ]
