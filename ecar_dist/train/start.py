"""Build every part of a training run, in the order in which they can fail: cheap checks first, allocations last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ecar_dist.config import RunConfig
from ecar_dist.data.stream import SampleStream
from ecar_dist.errors import ConfigError
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.models.build import build_model, weight_decay_groups
from ecar_dist.runtime.checkpoint import CheckpointStore
from ecar_dist.runtime.checkpoint_files import Progress, committed
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.metrics import MetricsWriter
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.train.loop import Preview, Training
from ecar_dist.train.objective import FlowObjective, Normalise
from ecar_dist.train.sources import TrainingData, check_codec, check_data, normaliser, open_loader, open_stream
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import LatentCodec

PreviewFactory = Callable[[RunConfig, LatentCodec, torch.device], Preview]


def start_training(
    config: RunConfig, world: World, *, training_flops_per_sample: float, preview_factory: PreviewFactory
) -> tuple[Training, Progress]:
    """Everything `train` needs, and the progress to go on from. Raises EcarError, on all ranks, before any step."""
    stop = StopRequest()
    world.together(lambda: config.grad_accum_steps(world.size))
    directory = RunDirectory(config.run_directory)
    data = world.together(lambda: check_data(config))
    stream = world.together(lambda: open_stream(config, data))
    precision = config.precision_on(world.device.type)
    codec = world.together(lambda: run_codec(config, data, world, precision))
    world.on_first_rank(lambda: open_attempt(directory, config, world))
    world.together(lambda: check_accumulation(config, world, precision))
    engine = build_engine(config, normaliser(data, codec), world, precision)
    ema = ShardedEma(engine.partitions, config.ema)
    identity = run_identity(config, data, stream, codec)
    store = CheckpointStore(directory.checkpoints, world, config.checkpoint.keep, identity)
    restored = store.restore(engine, ema)
    progress = restored or Progress()
    loader = world.together(lambda: open_loader(config, world, stream, progress.samples_seen))
    telemetry = Telemetry(world.device, world.size, training_flops_per_sample)
    run = Training(config, world, engine, ema, store, loader, telemetry, stop, directory)
    world.on_first_rank(lambda: begin_record(run, data, precision, restored))
    if codec and world.is_first and config.sample.every_samples and config.log.tensorboard:
        run.preview = preview_factory(config, codec, world.device)
    return run, progress


def open_attempt(directory: RunDirectory, config: RunConfig, world: World) -> None:
    """Rank 0: the run directory is this process's, and what it starts is on record. Raises EcarError."""
    directory.open_for_training()
    found = committed(directory.checkpoints)
    directory.begin_attempt(
        world_size=world.size,
        zero_stage=config.deepspeed.zero_stage,
        device=world.device.type,
        newest_step=int(found[0].name.removeprefix("step-")) if found else None,
    )


def begin_record(run: Training, data: TrainingData, precision: str, restored: Progress | None) -> None:
    """Rank 0: from here on the run is this config's, and its curves go on from here."""
    config, directory, progress = run.config, run.directory, restored or Progress()
    directory.note_attempt(
        dataset_ids=data.dataset_ids, precision=precision, resumed_from_step=restored and restored.step
    )
    directory.write_config(config)
    run.writer = MetricsWriter(directory, progress.step, config.log.tensorboard)
    print("\n".join(opening_lines(run, data, precision, progress)), flush=True)


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
) -> dict[str, Any]:
    """What must not change while a run goes on: what the weights mean, and the order of the data."""
    encoder = data.encoder or (codec and codec.identity)
    return {
        **config.model_identity,
        "run.seed": config.run.seed,
        "dataset_ids": data.dataset_ids,
        **{f"data_order.{name}": value for name, value in stream.describe().items()},
        "data.flip_images": config.data.flip_images,
        "data.resize": config.data.resize,
        "encoder.weights_sha256": encoder and encoder.weights_sha256,
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
        f"{total:,} samples to see = {total / data.count:.1f} epochs, {config.total_steps:,} steps; "
        + (f"resuming at step {progress.step:,} ({seen:,} samples)" if seen else "from the start"),
    ]
