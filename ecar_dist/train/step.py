"""One optimizer step: the micro-batches' losses and gradients, then one step of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.data.loader import MicroBatch
from ecar_dist.failpoint import failpoint
from ecar_dist.learning_rate import learning_rate
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.optimizer import PendingStatus
from ecar_dist.runtime.world import World
from ecar_dist.train.flags import Flags
from ecar_dist.train.telemetry import StepResult, Telemetry


@dataclass(frozen=True, kw_only=True)
class StepUnderWay:
    """A step whose work is queued on the device and whose numbers the host does not have yet."""

    begun: Progress  # before the step
    batches: Sequence[MicroBatch]  # of this rank
    learning_rate: float
    status: PendingStatus

    def read(self, config: RunConfig) -> tuple[StepResult, Flags]:
        """Wait for its numbers. Returns the result of the step and the summed flags, the same on every rank."""
        status = self.status.read()
        num_stages = config.flow.num_stages
        totals = status.sums[:num_stages]
        replaced, *flags = status.sums[num_stages:]

        # The means over the global batch.
        stage_losses = tuple(total / config.batch.global_batch_size for total in totals)
        weighted = zip(config.flow.resolved_stage_weights, stage_losses, strict=True)
        result = StepResult(
            loss=sum(weight * value for weight, value in weighted),
            stage_losses=stage_losses,
            grad_norm=status.grad_norm,
            learning_rate=self.learning_rate,
            applied=status.applied,
            replaced_samples=int(replaced),
        )
        return result, Flags(*flags)


def train_step(
    batches: Sequence[MicroBatch],
    progress: Progress,
    flags: Callable[[], Flags],
    *,
    config: RunConfig,
    world: World,
    engine: Engine,
    telemetry: Telemetry,
) -> StepUnderWay:
    """Train on this rank's micro-batches of the step that begins at `progress`. Collective.

    The engine judges the step before it moves a weight (see guard.py). The `flags` of this rank are summed together
    with the losses, so they are read only then. On a GPU the step is only queued when this function returns.
    """
    step = progress.step + 1
    batch = config.batch.global_batch_size

    # The learning rate is a function of the samples seen at the end of the step.
    rate = learning_rate(config.optim, progress.samples_seen + batch, config.train.total_samples)
    engine.set_learning_rate(rate)

    # A rank that is delayed here counts as a slow rank.
    telemetry.phases.enter("forward", step)
    with telemetry.forward_clock:
        failpoint("train.step", step)

    status = run_micro_batches(
        batches, step, flags, num_stages=config.flow.num_stages, world=world, engine=engine, telemetry=telemetry
    )
    return StepUnderWay(begun=progress, batches=batches, learning_rate=rate, status=status)


def run_micro_batches(
    batches: Sequence[MicroBatch],
    step: int,
    flags: Callable[[], Flags],
    *,
    num_stages: int,
    world: World,
    engine: Engine,
    telemetry: Telemetry,
) -> PendingStatus:
    """Forward and backward of each micro-batch of step number `step`, and the engine's step after the last. Collective.

    The sums of the status are the loss of each stage over the samples of the global batch, then the number of samples
    that were replaced, then the flags.
    """
    # Accumulated on the device, so that nothing waits for it.
    replaced = sum(len(micro.substitutions) for micro in batches)
    sums = world.tensor([0.0] * num_stages + [replaced])

    status = None
    for number, micro in enumerate(batches, 1):
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
        sums[:num_stages] += per_stage.double().sum(0)

        # Backward. Before the last one the ranks add up their sums, so that all of them judge the same numbers.
        telemetry.phases.enter("backward", step)
        if number == len(batches):
            sums = world.sum(torch.cat([sums, world.tensor(flags())]))
        engine.backward(loss)

        # Optimizer. It judges the step only after the last micro-batch.
        telemetry.phases.enter("optimizer", step)
        status = engine.step(sums)
    assert status is not None
    return status
