"""Build every part of a training run, in the order in which they can fail: cheap checks first, allocations last."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import SampleLoader
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import weight_decay_groups
from ecar_dist.runtime.checkpoint.files import Progress, committed
from ecar_dist.runtime.checkpoint.folder import open_place
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.replicas import check_replicas
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.signals import StopRequest
from ecar_dist.runtime.start.agreement import agree_on
from ecar_dist.runtime.watchdog.watchdog import Watchdog
from ecar_dist.runtime.world import World
from ecar_dist.storage.remote import is_remote, local_path
from ecar_dist.train.bad_step_file import BadStepFile
from ecar_dist.train.bad_steps import BadSteps
from ecar_dist.train.loop import Preview, Training
from ecar_dist.train.objective import Normalise
from ecar_dist.train.phases import Phases
from ecar_dist.train.preflight import check_nodes
from ecar_dist.train.record import begin_record, end_attempt, open_attempt
from ecar_dist.train.sources import TrainingData, check_codec, normaliser, open_loader, open_stream
from ecar_dist.train.telemetry import Telemetry
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec

SAME_IDENTITY = "give every node the same autoencoder (vae.path), data and version of ecar_dist"
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
    inputs = open_inputs(config, world, adopt)
    data, codec, precision = inputs.data, inputs.codec, inputs.precision
    attempt, run_id = world.broadcast(world.on_first_rank(lambda: open_attempt(directory, config, world)))
    watchdog = ends.enter_context(Watchdog(directory.logs / "watchdog", world, config.train.hang_seconds, attempt))
    ends.push(partial(end_attempt, directory, stop))
    phases = Phases(watchdog.beat)
    world.together(lambda: check_accumulation(config, world, precision))
    engine = build_engine(config, normaliser(data, codec), world, precision)
    ema = ShardedEma(engine.partitions, config.ema)
    store = CheckpointStore(
        config,
        world,
        inputs.identity,
        run_id=run_id,
        still_ours=directory.is_ours,
        allow_new_data=allow_new_data,
        adopt=adopt,
    )
    ends.callback(store.close)
    phases.enter("load", 0)
    restored = store.restore(engine, ema)
    progress, notes = (restored.progress, restored.notes) if restored else (Progress(), {})
    check_replicas(world, engine, ema, progress.step)
    phases.enter("start", progress.step)
    open_at = partial(open_together, config, world, inputs.stream)
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


class Inputs(NamedTuple):
    """What a run reads and all ranks hold alike."""

    data: TrainingData
    stream: SampleStream
    codec: LatentCodec | None
    precision: str  # "fp32" or "bf16", on this device
    identity: dict[str, dict[str, Any]]


def open_inputs(config: RunConfig, world: World, adopt: bool) -> Inputs:
    """The data, their order and the autoencoder, the same on all ranks. Nothing is written before. Collective.

    Raises as `start_training`.
    """
    data = check_nodes(config, world)
    stream = world.together(lambda: open_stream(config, data))
    if adopt:
        world.on_first_rank(lambda: check_adoption(config))
    precision = config.precision_on(world.device.type)
    codec = world.together(lambda: run_codec(config, data, world, precision))
    identity = run_identity(config, data, stream, codec)
    agree_on(world, "identity", identity_facts(identity, encoder_of(data, codec)), SAME_IDENTITY)
    return Inputs(data, stream, codec, precision, identity)


def check_adoption(config: RunConfig) -> None:
    """Raises ConfigError where there is no checkpoint to adopt, and says where some are."""
    with contextlib.closing(open_place(config)) as place:
        if place.committed():
            return
        where = place.where
    near: list[str] = []
    if not is_remote(where):
        above = local_path(where).parent
        folders = [above, *sorted(path for path in above.glob("*") if path.is_dir())]
        near = [f"{found[0].name} in {folder}" for folder in folders if (found := committed(folder))]
    seen = f"near it {', '.join(near[:3])}: copy that folder to {where}" if near else "nor any near it"
    wrong = "checkpoint.dir, run.dir or run.name"
    raise ConfigError(f"--adopt finds no checkpoint in {where}, {seen}, correct {wrong}, or leave --adopt out")


def open_together(config: RunConfig, world: World, stream: SampleStream, position: int) -> SampleLoader:
    """Every rank's loader at a position of the run's sample order. Raises on all ranks where one cannot open it."""
    return world.together(lambda: open_loader(config, world, stream, position))


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
    kind = kind_of(config)
    torch.manual_seed(config.run.seed)
    model = kind.build_model(config)
    objective = kind.objective(model, normalise, config, precision)
    decay, no_decay = weight_decay_groups(model)
    groups = [
        {"params": decay, "weight_decay": config.optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return Engine(objective, model, groups, config, world, precision)


def encoder_of(data: TrainingData, codec: LatentCodec | None) -> EncoderIdentity | None:
    """Whose latents the model sees; None on a rank that has neither latents nor the autoencoder."""
    return data.encoder or (codec.identity if codec else None)


def run_identity(
    config: RunConfig, data: TrainingData, stream: SampleStream, codec: LatentCodec | None
) -> dict[str, dict[str, Any]]:
    """What must not change while a run goes on: what the weights mean, and the order of the data."""
    encoder = encoder_of(data, codec)
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
            **_background_of_images(config),
        },
    }


def _background_of_images(config: RunConfig) -> dict[str, str]:
    """What lies behind transparent images, where it is not white: checkpoints from before it was known lack the key."""
    data = config.data
    return {"data.background": data.background} if data.images is not None and data.background != "white" else {}


def identity_facts(identity: Mapping[str, Mapping[str, Any]], encoder: EncoderIdentity | None) -> dict[str, str]:
    """The run's identity, and all of its autoencoder's but the name, as all ranks must have them."""
    facts = {key: value for part in identity.values() for key, value in part.items()}
    if encoder is not None:
        facts |= {f"encoder.{name}": value for name, value in encoder.to_dict().items() if name != "name"}
    return {key: json.dumps(value) for key, value in facts.items()}
