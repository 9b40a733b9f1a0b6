"""Moving averages of the fp32 master weights, sharded like them: element by element, nothing is gathered."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ecar_dist.averaging import Decay, half_life_decay, power_decay, sigma_rel_to_gamma
from ecar_dist.config.knobs_training import EmaSection


def tracked_decays(section: EmaSection) -> dict[str, Decay]:
    """The averages that a run keeps, by their names in checkpoints: the half-lives in order, then the power functions.

    The first is `ema`, the one that is drawn and exported; the others are `ema1`, `ema2`, ...
    """
    decays: list[Decay] = [functools.partial(half_life_decay, h, section.rampup) for h in section.half_life_samples]
    decays += [functools.partial(power_decay, sigma_rel_to_gamma(sigma_rel)) for sigma_rel in section.sigma_rel]
    return {f"ema{index or ''}": decay for index, decay in enumerate(decays)}


class ShardedEma:
    """Averages of this rank's master partitions, in fp32 beside them.

    `averages` holds one list of flat tensors, laid out like the master partitions, for each name of `tracked_decays`.
    """

    def __init__(self, masters: Sequence[torch.Tensor], section: EmaSection) -> None:
        self._masters, self._decays = list(masters), tracked_decays(section)
        self.averages: dict[str, list[torch.Tensor]] = {
            name: [master.detach().float().clone() for master in masters] for name in self._decays
        }

    @property
    def partitions(self) -> list[torch.Tensor]:
        """The first average, which is drawn and exported."""
        return self.averages["ema"]

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int) -> None:
        """Move towards the current master weights; call once after every step, refused ones included."""
        for name, average in self.averages.items():
            decay = float(self._decays[name](samples_seen, batch))
            torch._foreach_lerp_(average, self._masters, 1.0 - decay)
