"""One optimizer step: the micro-batches' losses and gradients, then one step of the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.failpoint import failpoint
from ecar_dist.learning_rate import learning_rate
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.engine import Engine, StepStatus
from ecar_dist.runtime.world import World
from ecar_dist.train.telemetry import StepResult, Telemetry


def train_step(
    batches: Sequence[MicroBatch],
    progress: Progress,
    *,
    config: RunConfig,
    world: World,
    engine: Engine,
    telemetry: Telemetry,
) -> StepResult:
    """Train on this rank's micro-batches of the step that begins at `progress`. Collective.

    The engine judges the step before a weight moves (see guard.py). The result is the same on every rank.
    """
    step = progress.step + 1
    batch = config.batch.global_batch_size

    # The learning rate is a function of the samples seen at the end of the step.
    rate = learning_rate(config.optim, progress.samples_seen + batch, config.train.total_samples)
    engine.set_learning_rate(rate)

    # A rank that is held up here is a slow rank.
    telemetry.phases.enter("forward", step)
    with telemetry.forward_clock:
        failpoint("train.step", step)

    status = run_micro_batches(
        batches, step, num_stages=config.flow.num_stages, world=world, engine=engine, telemetry=telemetry
    )
    telemetry.end_step(batch, status.applied)

    # The means over the global batch.
    *totals, replaced = status.sums
    stage_losses = tuple(total / batch for total in totals)
    loss_value = sum(w * value for w, value in zip(config.flow.resolved_stage_weights, stage_losses, strict=True))
    return StepResult(
        loss=loss_value,
        stage_losses=stage_losses,
        grad_norm=status.grad_norm,
        learning_rate=rate,
        applied=status.applied,
        replaced_samples=int(replaced),
    )


def run_micro_batches(
    batches: Sequence[MicroBatch], step: int, *, num_stages: int, world: World, engine: Engine, telemetry: Telemetry
) -> StepStatus:
    """Forward and backward of each micro-batch of step number `step`, and the engine's step after the last. Collective.

    The sums of the status are the loss of each stage over the samples of the global batch, then the number of samples
    that were replaced.
    """
    # Added up on the device, so that nothing waits for it before the step is judged.
    sums = torch.zeros(num_stages + 1, dtype=torch.float64, device=world.device)
    sums[-1] = sum(len(micro.substitutions) for micro in batches)

    status = None
    for micro in batches:
        # Forward.
        telemetry.phases.enter("forward", step)
        parts = (micro.values, micro.labels, micro.positions)
        values, labels, positions = (part.to(world.device, non_blocking=True) for part in parts)
        with telemetry.forward_clock:
            loss, per_stage, times = engine(values, labels, positions)  # [], [B, K], [B, K]
        if failpoint("train.loss", step):
            loss = loss * math.nan
            per_stage = per_stage * math.nan
        telemetry.losses.add(per_stage, times)
        sums[:-1] += per_stage.double().sum(0)

        # Backward. Ahead of the last one the ranks add up their sums, so that all of them judge the same numbers.
        telemetry.phases.enter("backward", step)
        if micro is batches[-1]:
            world.sum(sums)
        engine.backward(loss)

        # Optimizer. Only after the last micro-batch does it judge the step, and read the sums from the device.
        telemetry.phases.enter("optimizer", step)
        status = engine.step(sums)
    assert status is not None
    return status
