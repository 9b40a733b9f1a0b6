"""EMAs of the fp32 master weights, sharded like them. An update is elementwise, so nothing is gathered."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ecar_dist.averaging import Decay, half_life_decay, power_decay, sigma_rel_to_gamma
from ecar_dist.config.knobs_training import EmaSection


def tracked_decays(section: EmaSection) -> dict[str, Decay]:
    """The decay of each EMA that a run keeps, by kind: `ema`, `ema1`, ...; first half-lives, then power functions.

    Samples are drawn from `ema`, the first one, and an export contains it by default.
    """
    # The order is that of the config's lists, and the names are numbered in this order.
    decays: list[Decay] = [functools.partial(half_life_decay, h, section.rampup) for h in section.half_life_samples]
    decays += [functools.partial(power_decay, sigma_rel_to_gamma(sigma_rel)) for sigma_rel in section.sigma_rel]
    return {f"ema{index or ''}": decay for index, decay in enumerate(decays)}


def ema_kinds(section: EmaSection) -> dict[str, str]:
    """A description of each EMA, by kind. Checkpoints store it, because a config edit may renumber the kinds."""
    texts = [f"half-life {half_life}, ramp-up {section.rampup}" for half_life in section.half_life_samples]
    texts += [f"sigma_rel {sigma_rel}" for sigma_rel in section.sigma_rel]
    return dict(zip(tracked_decays(section), texts, strict=True))


class ShardedEma:
    """The EMAs of this rank's master partitions, in fp32 on the same device.

    by_kind: for each kind of `tracked_decays`, flat tensors with the layout of the master partitions.
    """

    def __init__(self, masters: Sequence[torch.Tensor], section: EmaSection) -> None:
        self._masters = list(masters)
        self._decays = tracked_decays(section)

        # An EMA starts at the initial weights; its ramp-up makes it forget them.
        self.by_kind: dict[str, list[torch.Tensor]] = {
            name: [master.detach().float().clone() for master in masters] for name in self._decays
        }

    @property
    def partitions(self) -> list[torch.Tensor]:
        """The first EMA, which samples are drawn from."""
        return self.by_kind["ema"]

    @torch.no_grad()
    def restart(self) -> None:
        """Start over from the current master weights, as at the start of a run."""
        for average in self.by_kind.values():
            for partition, master in zip(average, self._masters, strict=True):
                partition.copy_(master)

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int) -> None:
        """Move towards the current master weights. Call it once after every step, including a refused one."""
        # e <- decay * e + (1 - decay) * w, for all partitions in one call.
        for name, average in self.by_kind.items():
            decay = float(self._decays[name](samples_seen, batch))
            torch._foreach_lerp_(average, self._masters, 1.0 - decay)
