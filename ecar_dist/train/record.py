"""What goes on record about an attempt at a run, and what its log says first: rank 0's, but for how it ended."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from ecar_dist.command_line import counted, say
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, EcarError, FruitlessError
from ecar_dist.runtime.checkpoint.files import Progress, step_of
from ecar_dist.runtime.checkpoint.folder import CheckpointPlace, open_place, place_at
from ecar_dist.runtime.checkpoint.restore import Restored
from ecar_dist.runtime.peers import lost_peer
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.drift import resume_lines
from ecar_dist.runtime.run.metrics import MetricsWriter
from ecar_dist.runtime.signals import StoppedEarlyError, StopRequest
from ecar_dist.runtime.world import World
from ecar_dist.storage.redaction import redact_text
from ecar_dist.storage.remote import is_remote
from ecar_dist.train.goodput import began
from ecar_dist.train.loop import Training, last_step
from ecar_dist.train.sources import TrainingData


def open_attempt(directory: RunDirectory, config: RunConfig, world: World) -> tuple[str, str]:
    """Rank 0: the run directory is this process's, and what it starts is on record. Names of the attempt, the run."""
    directory.open_for_training()
    place = open_place(config)
    found, attempts = place.committed(), directory.attempts()
    where = place.where if is_remote(place.where) else str(Path(place.where).absolute())
    before = (attempts[-1].get("checkpoints") or where) if attempts else where
    if before != where and directory.metrics.exists() and directory.metrics.stat().st_size:
        newest, left = (step_of(found[0]) if found else None), newest_step_at(config, before)
        if newest is None or (left is not None and left > newest):
            held = "no checkpoint" if newest is None else f"checkpoints up to step {newest}"
            theirs = "its own" if left is None else f"its own up to step {left}"
            raise CheckpointError(
                f"{where} holds {held}, and the last attempt kept {theirs} in {before}; set checkpoint.dir back, bring "
                f"them over, or choose another run.name to train anew"
            )
    # its own folder alone: to take checkpoints from elsewhere for one's own, there is --adopt
    lost = directory.record_lost and where == str(directory.checkpoints.absolute())
    lost_name = {"run": name} if lost and (name := run_of(place, found)) else {}
    attempt = directory.begin_attempt(
        world_size=world.size,
        zero_stage=config.deepspeed.zero_stage,
        device=world.device.type,
        checkpoints=where,
        newest_step=step_of(found[0]) if found else None,
        **lost_name,
    )
    return attempt, directory.run_id


def run_of(place: CheckpointPlace, found: Sequence[str]) -> str | None:
    """The run whose checkpoints these are, by the newest that can be read; None where none can."""
    for name in found:
        with contextlib.suppress(OSError, EcarError):
            return place.manifest(name).run
    return None


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
        verb = "gave up" if isinstance(error, FruitlessError) else "failed"
        reason = redact_text(f"{verb}: {error}") if error else "done"
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


def resume_notes(run: Training, data: TrainingData, restored: Restored) -> list[str]:
    """What is not as it was when the checkpoint was made: the layout, the order of the data, the config."""
    attempts = [one for one in run.directory.attempts() if "dataset_ids" in one]
    same_data = bool(attempts) and attempts[-1]["dataset_ids"] == data.dataset_ids
    said = [f"resuming {restored.path}: {restored.conversion}"] if restored.conversion else []
    said += [restored.new_data_order] if restored.new_data_order else []
    return said + resume_lines(run.directory.config, run.config, same_data=same_data)


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


def opening_lines(run: Training, data: TrainingData, precision: str, progress: Progress) -> list[str]:
    """The arithmetic of the run, said once."""
    config, world = run.config, run.world
    batch, accumulate, ranks = config.batch, config.grad_accum_steps(world.size), counted(world.size, "rank")
    parameters = sum(torch.Size(shape).numel() for shape in run.engine.shapes.values())
    tokens = f"{' + '.join(map(str, config.stage_tokens))} tokens in {config.flow.num_stages} stages"
    model = f"{config.model.kind} {config.model.preset}, {parameters / 1e6:.2f} M parameters"
    total, seen = config.train.total_samples, progress.samples_seen
    spread = run.loader.stream.batch_spread()
    shards = counted(sum(len(manifest.shards) for manifest in data.manifests), "shard")
    return [
        f"run {config.run_directory}: {model}, {tokens}",
        (
            f"{ranks} on {world.device.type}, ZeRO-{config.deepspeed.zero_stage}, {precision}; global batch "
            f"{batch.global_batch_size} = {batch.micro_batch_size} x {accumulate} x {ranks}"
        ),
        (
            f"data {data.count:,} {'samples' if data.encoder else 'images, encoded on the way'}, a global batch from "
            f"about {spread:.0f} of {shards}"
        ),
        f"{total:,} samples to see = {total / data.count:.1f} epochs, {last_step(config, progress):,} steps; "
        + (f"resuming at step {progress.step:,} ({seen:,} samples)" if seen else "from the start"),
    ]
