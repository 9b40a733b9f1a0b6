"""The loss on held-out samples, at fixed times and with fixed noise, of the weights and of their EMA.

Nothing random is left: two values of one run differ only because its weights do. Two runs with the same stages and
samples can be compared, whatever their seeds, batches and ranks.
"""

from __future__ import annotations

from typing import cast

import torch

from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.engine import Engine
from ecar_dist.runtime.world import World
from ecar_dist.train.objective import Objective
from ecar_dist.train.time_budget import Phases
from ecar_dist.train.validation.heldout import Heldout

TIMES = (0.125, 0.375, 0.625, 0.875)  # within each stage; every sample is evaluated at each


class Validation:
    """Computes the validation loss. Every method is collective."""

    def __init__(self, config: RunConfig, world: World, heldout: Heldout, phases: Phases) -> None:
        self._config = config
        self._world = world
        self._heldout = heldout
        self._phases = phases

    def values(self, progress: Progress, engine: Engine, ema: ShardedEma) -> dict[str, float]:
        """By tag: `eval/loss` and `eval/loss_stage{k}` of the weights, `eval/loss_ema...` of their EMA.

        The state of the run is the same afterwards, to the bit.
        """
        objective = cast(Objective, engine.objective)
        with engine.own_weights():
            values = self._tagged("eval/loss", self._stage_losses(objective, progress.step))
        with engine.weights_of(ema.partitions):
            values |= self._tagged("eval/loss_ema", self._stage_losses(objective, progress.step))
        return values

    def _stage_losses(self, objective: Objective, step: int) -> list[float]:
        """The mean loss of each stage over samples and times, the same on all ranks."""
        device = self._world.device
        sums = torch.zeros(self._config.flow.num_stages, dtype=torch.float64, device=device)
        for batch in self._heldout.batches:
            self._phases.enter("validate", step)
            moments, labels, ids, counts = (
                part.to(device) for part in (batch.moments, batch.labels, batch.sample_ids, batch.counts)
            )
            for number, time in enumerate(TIMES):
                # Different noise at each time.
                keys = ids * len(TIMES) + number
                losses = objective.heldout_losses(moments, labels, keys, time, self._heldout.normalise)  # [B, K]
                sums += counts @ losses.double()
        return (self._world.sum(sums) / (self._heldout.count * len(TIMES))).tolist()

    def _tagged(self, tag: str, losses: list[float]) -> dict[str, float]:
        weighted = zip(self._config.flow.resolved_stage_weights, losses, strict=True)
        total = sum(weight * loss for weight, loss in weighted)
        return {tag: total, **{f"{tag}_stage{k}": loss for k, loss in enumerate(losses)}}
