"""Build every part of a training run, in the order in which they can fail: cheap checks first, allocations last.

`start_training` is the table of contents. The parts follow in order, then what identifies a run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from ecar_dist.command_line import say
from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import SampleLoader
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import parameter_groups
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.restore import Restored
from ecar_dist.runtime.checkpoint.storage import check_adoption
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.compiler import check_compiler
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.initial.load import Beginning, begin, plan_beginning
from ecar_dist.runtime.run.console import ConsoleLog
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.metrics import MetricsWriter
from ecar_dist.runtime.run.trackers import open_trackers
from ecar_dist.runtime.sharded_build import sharded_build
from ecar_dist.runtime.signals import StopRequest
from ecar_dist.runtime.start.agreement import agree_on
from ecar_dist.runtime.watchdog.watchdog import Watchdog
from ecar_dist.runtime.world import World
from ecar_dist.train.guard import BadStepFile, StepGuard, is_good
from ecar_dist.train.loop import Parts, RunState, Saver
from ecar_dist.train.objective import Normalise
from ecar_dist.train.preflight import check_nodes
from ecar_dist.train.reader import StepReader
from ecar_dist.train.record import (
    Preview,
    Recorder,
    changes_on_resume,
    end_attempt,
    open_attempt,
    opening_lines,
    unreachable_half_lives,
)
from ecar_dist.train.sources import (
    TrainingData,
    check_codec,
    identity_facts,
    normaliser,
    open_loader,
    open_stream,
    read_weights,
    recorded_order,
    run_identity,
)
from ecar_dist.train.telemetry import Counters, Telemetry
from ecar_dist.train.time_budget import Goodput, Phases, run_began
from ecar_dist.train.validation.heldout import Heldout, open_heldout
from ecar_dist.train.validation.validate import Validation
from ecar_dist.vae.build import open_codec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec

BACKEND = "inductor"  # of torch.compile
SAME_IDENTITY = "give every node the same autoencoder (vae.path), data and version of ecar_dist"
PreviewFactory = Callable[[RunConfig, LatentCodec | None, torch.device], Preview]


def start_training(
    config: RunConfig,
    world: World,
    ends: contextlib.ExitStack,
    *,
    training_flops_per_sample: float,
    preview_factory: PreviewFactory,
    allow_new_data: bool = False,
    adopt: bool = False,
) -> tuple[Parts, Progress]:
    """Build everything that `train` needs. Returns it with the progress to continue from. Collective.

    `ends` receives everything that has to be closed. Raises EcarError, on all ranks, before any step.
    """
    stop, console = StopRequest(), ConsoleLog()

    # What the run reads, checked on all ranks. Nothing has been written yet.
    world.together(lambda: config.grad_accum_steps(world.size))  # the cheapest check comes first
    inputs = open_inputs(config, world, adopt, allow_new_data)

    # From here on the run directory belongs to this attempt.
    directory, run_id, phases = begin_attempt(config, world, stop, console, ends)

    # The state of the run: allocated, then loaded.
    state = allocate(config, world, inputs, directory)
    store = open_store(config, world, inputs, directory, run_id, allow_new_data=allow_new_data, adopt=adopt)
    ends.callback(store.close)
    saver = Saver(config=config, world=world, state=state, store=store, phases=phases)
    restored = saver.load()
    progress = restored.progress if restored else Progress(0, 0)
    begin(inputs.beginning, world, state.engine, state.ema)

    # The samples from that position on, and the held-out samples.
    reader = open_reader(config, world, inputs, progress.samples_seen, stop, phases)
    ends.callback(reader.close)
    validation = Validation(config, world, inputs.heldout, phases) if inputs.heldout else None

    # What is measured, and what is recorded.
    telemetry = Telemetry(config, world, phases, state.goodput, training_flops_per_sample)
    writer = world.on_first_rank(lambda: open_record(config, world, directory, inputs, state, store, restored))
    if writer:
        ends.callback(writer.close)
    preview = world.together(lambda: open_preview(config, world, inputs.codec, preview_factory))
    counters = partial(read_counters, reader, store, state.guard)
    logs = directory.logs
    recorder = Recorder(
        config=config, world=world, logs=logs, telemetry=telemetry, counters=counters, writer=writer, preview=preview
    )
    parts = Parts(
        config=config,
        world=world,
        stop=stop,
        state=state,
        reader=reader,
        telemetry=telemetry,
        recorder=recorder,
        saver=saver,
        validation=validation,
    )
    return parts, progress


class Inputs(NamedTuple):
    """What a run reads, the same on all ranks."""

    data: TrainingData
    stream: SampleStream
    codec: LatentCodec | None
    precision: str  # "fp32" or "bf16", on this device
    identity: dict[str, dict[str, Any]]
    heldout: Heldout | None
    beginning: Beginning  # where the weights of a new run come from


def open_inputs(config: RunConfig, world: World, adopt: bool, new_data_order: bool) -> Inputs:
    """Read the manifests, the order of the data and the autoencoder, and compare them between ranks. Collective."""
    # Check that the nodes are fit and see the same data.
    data = check_nodes(config, world)

    # The order of the samples, made as in the first attempt; and whether there is a checkpoint to adopt, if asked.
    made = None if new_data_order else world.broadcast(world.on_first_rank(lambda: recorded_order(config)))
    stream = world.together(lambda: open_stream(config, data, made))
    if adopt:
        world.on_first_rank(lambda: check_adoption(config))

    # The autoencoder, and what must be the same on all ranks.
    precision = config.precision_on(world.device.type)
    codec = world.together(lambda: run_codec(config, data, world, precision))
    identity = run_identity(config, data, stream, codec)
    agree_on(world, "identity", identity_facts(identity, encoder_of(data, codec)), SAME_IDENTITY)

    # The samples of the validation loss; and another run's weights, for a run that has none of its own.
    heldout = open_heldout(config, world, encoder_of(data, codec))
    given = world.together(lambda: read_weights(config, data))
    beginning = plan_beginning(config, world, data.class_names, identity["model"]["encoder.weights_sha256"], given)
    return Inputs(data, stream, codec, precision, identity, heldout, beginning)


def run_codec(config: RunConfig, data: TrainingData, world: World, precision: str) -> LatentCodec | None:
    """The config's autoencoder: on every rank's device if it encodes images, else on rank 0 only, for comparison."""
    if data.encoder is not None and not world.is_first:
        return None

    # Only an autoencoder that encodes during training has to be fast.
    encodes = data.encoder is None
    dtype = torch.bfloat16 if encodes and precision == "bf16" else torch.float32
    codec = open_codec(config.vae, world.device if encodes else "cpu", dtype)
    check_codec(config, data, codec)
    return codec


def begin_attempt(
    config: RunConfig, world: World, stop: StopRequest, console: ConsoleLog, ends: contextlib.ExitStack
) -> tuple[RunDirectory, str, Phases]:
    """Record this attempt, and start its watchdog. The end of the attempt is recorded as well.

    Returns the run directory, the id of the run, and the clock of its phases.
    """
    # Rank 0 opens the directory, and sends the names of the attempt and the run to the others.
    directory = RunDirectory(config.run_directory)
    attempt, run_id = world.broadcast(world.on_first_rank(lambda: open_attempt(directory, config, world)))
    console.open(directory.logs, attempt, world.rank)

    # In this order the watchdog is still active while the end of the attempt is recorded.
    watchdog = ends.enter_context(Watchdog(directory.logs / "watchdog", world, config.train.hang_seconds, attempt))
    ends.push(partial(end_attempt, directory, stop))
    return directory, run_id, Phases(watchdog.beat)


def allocate(config: RunConfig, world: World, inputs: Inputs, directory: RunDirectory) -> RunState:
    """The state of a run at its start: the engine, which asks the guard before it moves a weight, and the EMA."""
    # The guard first: the engine asks it before each step.
    world.together(lambda: check_accumulation(config, world, inputs.precision))
    guard = StepGuard(config.train.bad_steps, BadStepFile(directory.path / "bad_steps.jsonl", world), world)
    engine = build_engine(config, normaliser(inputs.data, inputs.codec), world, inputs.precision, guard.is_good)

    # Goodput counts from the run's first attempt, and only rank 0 reports it.
    goodput = Goodput(world.on_first_rank(lambda: run_began(directory.attempts())))
    ema = ShardedEma(engine.partitions, config.ema)
    names = inputs.data.class_names
    return RunState(engine=engine, ema=ema, guard=guard, goodput=goodput, class_names=names)


def check_accumulation(config: RunConfig, world: World, precision: str) -> None:
    """Raises ConfigError if DeepSpeed would add up micro-batches in bf16."""
    steps = config.grad_accum_steps(world.size)
    if config.deepspeed.zero_stage == 0 and precision == "bf16" and steps > 1:
        raise ConfigError(
            f"deepspeed.zero_stage=0 with bf16 sums the gradients of {steps} micro-batches in bf16; set "
            f"deepspeed.zero_stage=1, deepspeed.precision=fp32, or a batch.micro_batch_size {steps} times as large"
        )


def build_engine(
    config: RunConfig,
    normalise: Normalise,
    world: World,
    precision: str,
    is_good: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = is_good,
) -> Engine:
    """The model, initialised from the run's seed alone, the objective around it, and DeepSpeed around both.

    `is_good(loss, grad_norm)`: as for `Engine`; by default both have to be finite. Raises ConfigError, on all ranks,
    if the model is to be compiled but cannot be.
    """
    backend = BACKEND if config.compiles_on(world.device.type) else None
    if backend is not None:
        world.together(lambda: check_compiler(world.device))

    # The model and its loss.
    kind = kind_of(config)
    torch.manual_seed(config.run.seed)
    with sharded_build(config, world, precision):
        model = kind.build_model(config)
        objective = kind.objective(model, normalise, config, precision)

    groups = parameter_groups(model, config.optim.weight_decay)
    return Engine(objective, model, groups, config, world, precision, is_good, backend=backend)


def open_store(
    config: RunConfig,
    world: World,
    inputs: Inputs,
    directory: RunDirectory,
    run_id: str,
    *,
    allow_new_data: bool,
    adopt: bool,
) -> CheckpointStore:
    """The checkpoints of the run. Once another attempt has taken over the directory, no more are committed."""
    return CheckpointStore(
        config,
        world,
        inputs.identity,
        run_id=run_id,
        still_ours=directory.is_ours,
        allow_new_data=allow_new_data,
        adopt=adopt,
    )


def open_reader(
    config: RunConfig, world: World, inputs: Inputs, position: int, stop: StopRequest, phases: Phases
) -> StepReader:
    """The samples of the run from `position` on. Raises on all ranks if one of them cannot open its samples."""

    def open_at(position: int) -> SampleLoader:
        return world.together(lambda: open_loader(config, world, inputs.data, inputs.stream, position))

    return StepReader(config=config, world=world, open_loader=open_at, position=position, stop=stop, phases=phases)


def open_record(
    config: RunConfig,
    world: World,
    directory: RunDirectory,
    inputs: Inputs,
    state: RunState,
    store: CheckpointStore,
    restored: Restored | None,
) -> MetricsWriter:
    """Rank 0: record the start of this attempt, and print how the run continues. Returns the metrics writer."""
    # The arithmetic of the run.
    progress = restored.progress if restored else Progress(0, 0)
    lines = opening_lines(
        config,
        world,
        data=inputs.data,
        precision=inputs.precision,
        parameters=sum(torch.Size(shape).numel() for shape in state.engine.shapes.values()),
        batch_spread=inputs.stream.batch_spread(),
        progress=progress,
    )

    # The changes are those since the last attempt, so they are determined before this one is recorded.
    if restored:
        lines += changes_on_resume(config, directory, inputs.data, restored)
    lines += [
        f"steps {first} to {last} are passed over, as bad_steps.jsonl says"
        for first, last in state.guard.history.ahead(progress.step)
    ]
    lines += unreachable_half_lives(config)
    lines += inputs.beginning.lines

    # From here on this is the config of the run, and its curves continue from this step.
    directory.note_attempt(
        dataset_ids=inputs.data.dataset_ids,
        precision=inputs.precision,
        resumed_from_step=restored and restored.progress.step,
        **({"heldout_id": inputs.heldout.dataset_id} if inputs.heldout else {}),
        **inputs.beginning.facts,
    )
    directory.write_config(config)
    writer = MetricsWriter(directory, progress.step, config.log.tensorboard, open_trackers(config, directory))

    # Print to the screen.
    say("\n".join(lines))
    if warning := store.space_warning(state.engine):
        print(warning, file=sys.stderr)
    return writer


def open_preview(config: RunConfig, world: World, codec: LatentCodec | None, factory: PreviewFactory) -> Preview | None:
    """The part that draws the previews, or None for a run without previews."""
    if config.sample.every_samples == 0 or not config.log.tensorboard:
        return None
    return factory(config, codec, world.device)


def read_counters(reader: StepReader, store: CheckpointStore, guard: StepGuard) -> Counters:
    """The counters of these parts so far."""
    return Counters(
        data_wait_seconds=reader.wait_seconds,
        stall_seconds=store.stall_seconds,
        checkpoint_failures=store.failures,
        skipped_steps=guard.history.skipped,
        downloads=reader.traffic(),
    )


def encoder_of(data: TrainingData, codec: LatentCodec | None) -> EncoderIdentity | None:
    """The encoder of the latents that the model sees; None on a rank with neither latents nor the autoencoder."""
    return data.encoder or (codec.identity if codec else None)
