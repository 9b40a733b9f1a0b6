"""Build every part of a training run, in the order in which they can fail: cheap checks first, allocations last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ecar_dist.config import RunConfig
from ecar_dist.data.loader import LatentLoader
from ecar_dist.data.manifest import Manifest, load_manifest
from ecar_dist.data.order import ORDER_NAME
from ecar_dist.data.shard_files import check_presence
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.models.build import build_model, weight_decay_groups
from ecar_dist.runtime.checkpoint import CheckpointStore, Progress
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.metrics import MetricsWriter
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.train.loop import Preview, Training
from ecar_dist.train.objective import FlowObjective
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec, check_same_encoder, normalise

PreviewFactory = Callable[[RunConfig, LatentCodec, torch.device], Preview]


def start_training(
    config: RunConfig, world: World, *, training_flops_per_sample: float, preview_factory: PreviewFactory
) -> tuple[Training, Progress]:
    """Everything `train` needs, and the progress to go on from. Raises EcarError, on all ranks, before any step."""
    stop = StopRequest()
    world.together(lambda: config.grad_accum_steps(world.size))
    directory = RunDirectory(config.run_directory)
    manifest = world.together(lambda: check_data(config))
    codec = world.on_first_rank(lambda: claim(directory, config, manifest))
    precision = config.precision_on(world.device.type)
    world.together(lambda: check_accumulation(config, world, precision))
    engine = build_engine(config, manifest, world, precision)
    ema = ShardedEma(engine.partitions, config.ema.half_life_samples, config.ema.rampup)
    store = CheckpointStore(directory.checkpoints, world, config.checkpoint.keep, run_identity(config, manifest))
    restored = store.restore(engine, ema)
    progress = restored or Progress()
    loader = world.together(lambda: open_loader(config, world, progress))
    telemetry = Telemetry(world.device, world.size, training_flops_per_sample)
    run = Training(config, world, engine, ema, store, loader, telemetry, stop)
    world.on_first_rank(lambda: begin_record(run, directory, manifest, precision, restored))
    if codec and config.sample.every_samples and config.log.tensorboard:
        run.preview = preview_factory(config, codec, world.device)
    return run, progress


def begin_record(
    run: Training, directory: RunDirectory, manifest: Manifest, precision: str, restored: Progress | None
) -> None:
    """Rank 0: from here on the attempt is on record."""
    config, world, progress = run.config, run.world, restored or Progress()
    directory.record_attempt(
        config,
        world_size=world.size,
        zero_stage=config.deepspeed.zero_stage,
        precision=precision,
        device=world.device.type,
        dataset_id=manifest.dataset_id,
        resumed_from_step=restored and restored.step,
    )
    run.writer = MetricsWriter(directory, progress.step, config.log.tensorboard)
    print("\n".join(opening_lines(config, world, manifest, run.engine, precision, progress)), flush=True)


def check_data(config: RunConfig) -> Manifest:
    """The manifest of the latents. Raises DataError where it does not fit the config, or a shard is not there."""
    manifest = load_manifest(config.data.latents)
    identity = EncoderIdentity.from_dict(manifest.encoder)
    data, shape = config.data, manifest.moments_shape
    found = {
        "data.latent_channels": identity.latent_channels,
        "data.latent_size": shape[-1],
        "data.num_classes": manifest.num_classes,
    }
    for key, value in found.items():
        configured = getattr(data, key.removeprefix("data."))
        if configured != value:
            raise DataError(f"{key}={configured}, but the latents in {data.latents} have {value}; set {key}={value}")
    check_presence(data.latents, manifest.shards)
    return manifest


def claim(directory: RunDirectory, config: RunConfig, manifest: Manifest) -> LatentCodec:
    """Rank 0: check that the config's autoencoder made the latents, then take the run directory."""
    codec = open_codec(config.vae)
    check_same_encoder(codec.identity, EncoderIdentity.from_dict(manifest.encoder), config.data.latents)
    directory.open_for_training()
    return codec


def open_loader(config: RunConfig, world: World, progress: Progress) -> LatentLoader:
    return LatentLoader(
        config.data.latents,
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        start=progress.samples_seen,
        prefetch=config.data.prefetch,
    )


def check_accumulation(config: RunConfig, world: World, precision: str) -> None:
    """Raises ConfigError where DeepSpeed would add up micro-batches in bf16."""
    if config.deepspeed.zero_stage == 0 and precision == "bf16" and config.grad_accum_steps(world.size) > 1:
        raise ConfigError(
            "deepspeed.zero_stage=0 with bf16 sums gradients over micro-batches in bf16; "
            "use deepspeed.zero_stage=1, or precision=fp32, or one micro-batch per rank and step"
        )


def build_engine(config: RunConfig, manifest: Manifest, world: World, precision: str) -> Engine:
    """The model, from the run's seed alone, the objective around it, and DeepSpeed around both."""
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    torch.manual_seed(config.run.seed)
    model = build_model(config, schedule.context_scales(config.flow.context.tau))
    normaliser = partial(normalise, EncoderIdentity.from_dict(manifest.encoder))
    objective = FlowObjective(model, schedule, normaliser, config, precision)
    decay, no_decay = weight_decay_groups(model)
    groups = [
        {"params": decay, "weight_decay": config.optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return Engine(objective, model, groups, config, world, precision)


def run_identity(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What must not change while a run goes on: what the weights mean, and the order of the data."""
    return {
        **config.model_identity,
        "run.seed": config.run.seed,
        "dataset_id": manifest.dataset_id,
        "data_order": ORDER_NAME,
        "encoder.weights_sha256": manifest.encoder["weights_sha256"],
    }


def opening_lines(
    config: RunConfig, world: World, manifest: Manifest, engine: Engine, precision: str, progress: Progress
) -> list[str]:
    """The arithmetic of the run, said once."""
    batch, accumulate = config.batch, config.grad_accum_steps(world.size)
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    tokens = f"{' + '.join(map(str, config.stage_tokens))} tokens in {config.flow.num_stages} stages"
    model = f"{config.model.kind} {config.model.preset}, {parameters / 1e6:.2f} M parameters"
    total, seen = config.train.total_samples, progress.samples_seen
    return [
        f"run {config.run_directory}: {model}, {tokens}",
        (
            f"{world.size} ranks on {world.device.type}, ZeRO-{config.deepspeed.zero_stage}, {precision}; global batch "
            f"{batch.global_batch_size} = {batch.micro_batch_size} x {accumulate} x {world.size} ranks"
        ),
        f"data {manifest.count:,} samples, {total:,} to see = {total / manifest.count:.1f} epochs, "
        f"{config.total_steps:,} steps; "
        + (f"resuming at step {progress.step:,} ({seen:,} samples)" if seen else "from the start"),
    ]
