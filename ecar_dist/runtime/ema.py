"""Exponential moving average of the fp32 master weights, sharded like them: element by element, nothing is gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ema_decay(half_life_samples: float, rampup: float, samples_seen: int, batch: int) -> float:
    """Weight of the old average after a step of `batch` samples that ended at `samples_seen`.

    beta = 0.5^(batch / h), where the half-life h is at most `rampup` x samples_seen, so that the average forgets the
    random start (EDM, Karras et al., arXiv 2206.00364, app. F.2). A function of samples seen, not of steps.
    """
    half_life = min(float(half_life_samples), rampup * samples_seen)
    return 0.5 ** (batch / half_life)


class ShardedEma:
    """The average of this rank's master partitions, in fp32 beside them."""

    def __init__(self, masters: Sequence[torch.Tensor], half_life_samples: int, rampup: float) -> None:
        self._masters = masters
        self._half_life, self._rampup = half_life_samples, rampup
        self.partitions = [master.detach().float().clone() for master in masters]

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int) -> None:
        """Move towards the current master weights; call once after every optimizer step."""
        decay = ema_decay(self._half_life, self._rampup, samples_seen, batch)
        for average, master in zip(self.partitions, self._masters, strict=True):
            average.lerp_(master.detach().to(average.device), 1.0 - decay)
