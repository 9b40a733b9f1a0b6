"""The learning rate as a function of samples seen. To add a schedule, add an entry to SCHEDULES.

Plain arithmetic on the `optim` section of the config, which takes the names of the schedules from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol


class OptimSettings(Protocol):
    """The fields of the config's `optim` section that a schedule may read."""

    @property
    def schedule(self) -> str: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def final_learning_rate(self) -> float: ...

    @property
    def warmup_samples(self) -> int: ...

    @property
    def cooldown_samples(self) -> int: ...


def learning_rate(optim: OptimSettings, samples_seen: int, total_samples: int) -> float:
    """The rate of the optimizer step that ends at `samples_seen`: linear warm-up, then the schedule."""
    # Warm-up is the same for every schedule: proportional to the samples seen, so it starts at zero.
    if samples_seen < optim.warmup_samples:
        return optim.learning_rate * samples_seen / optim.warmup_samples
    return SCHEDULES[optim.schedule](optim, samples_seen, total_samples)


def constant(optim: OptimSettings, samples_seen: int, total_samples: int) -> float:
    return optim.learning_rate


def cosine(optim: OptimSettings, samples_seen: int, total_samples: int) -> float:
    """Half a cosine from the peak at the end of the warm-up to the final rate."""
    peak, final = optim.learning_rate, optim.final_learning_rate
    # 0 at the end of the warm-up, 1 at the end of the run, even if the run was shortened.
    done = (samples_seen - optim.warmup_samples) / max(1, total_samples - optim.warmup_samples)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def cooldown(optim: OptimSettings, samples_seen: int, total_samples: int) -> float:
    """Constant, then linear to the final rate over the last `cooldown_samples`."""
    peak, final = optim.learning_rate, optim.final_learning_rate
    # 1 at the start of the cooldown, 0 at the end of the run; more than 1 before the cooldown.
    left = max(0.0, (total_samples - samples_seen) / optim.cooldown_samples)
    return final + (peak - final) * min(1.0, left)


# (the config's optim section, samples seen, total samples of the run) -> rate, from the end of the warm-up on
SCHEDULES: dict[str, Callable[[OptimSettings, int, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "cooldown": cooldown,
}
