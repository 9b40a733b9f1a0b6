"""The learning rate as a function of samples seen."""

from __future__ import annotations

import math

from ecar_dist.config.run import OptimSection


def learning_rate(optim: OptimSection, samples_seen: int, total_samples: int) -> float:
    """The rate of the optimizer step that ends at `samples_seen`: linear warm-up, then the schedule."""
    if samples_seen < optim.warmup_samples:
        return optim.learning_rate * samples_seen / optim.warmup_samples
    peak, final = optim.learning_rate, optim.final_learning_rate
    if optim.schedule == "cosine":
        done = (samples_seen - optim.warmup_samples) / max(1, total_samples - optim.warmup_samples)
        return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if optim.schedule == "cooldown" and optim.cooldown_samples:
        left = max(0.0, (total_samples - samples_seen) / optim.cooldown_samples)
        return final + (peak - final) * min(1.0, left)
    return peak
