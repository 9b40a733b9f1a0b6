"""How many tokens a masked model draws in each step. Plain arithmetic without torch, so that `plan` can count it."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(share: float) -> float:
    """cos(pi/2 share): the schedule of MaskGIT (Chang et al., arXiv 2202.04200) that MAR uses."""
    return math.cos(math.pi / 2 * share)


def arccosine(share: float) -> float:
    """2/pi arccos(share): the schedule of DC-AR (arXiv 2507.04947), which unmasks the last tokens in fewer steps."""
    return 2 / math.pi * math.acos(share)


def masked_counts(num_tokens: int, ar_steps: int, schedule: Callable[[float], float] = cosine) -> tuple[int, ...]:
    """Masked tokens before the first step and after each step: from T down to 0, at least one less per step.

    After step i of n, floor(T schedule(i/n)) tokens are masked. There are never more steps than tokens.
    """
    # A step that draws no token would waste a pass of the trunk.
    steps = min(ar_steps, num_tokens)
    counts = [num_tokens]
    for done in range(1, steps):
        scheduled = math.floor(num_tokens * schedule(done / steps))
        # Every step draws at least one token, and leaves at least one for each later step.
        counts.append(max(steps - done, min(counts[-1] - 1, scheduled)))
    return (*counts, 0)


def masked_guidance_scales(guidance_scale: float, counts: tuple[int, ...], ramp: str) -> tuple[float, ...]:
    """The guidance scale of each step. `linear`, as in MAR: from 1 to w with the share of tokens drawn.

    w = 0 is the unconditional model: 0 in every step, whatever the ramp.
    """
    if ramp == "constant" or guidance_scale == 0.0:
        return (guidance_scale,) * (len(counts) - 1)
    return tuple(1.0 + (guidance_scale - 1.0) * (1.0 - after / counts[0]) for after in counts[1:])
