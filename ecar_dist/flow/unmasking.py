"""How many tokens a masked model draws in each of its steps. Plain arithmetic without torch, so `plan` can count it."""

from __future__ import annotations

import math


def masked_counts(num_tokens: int, ar_steps: int) -> tuple[int, ...]:
    """Tokens that are masked before the first step and after each: falling from T to 0, by one a step at least.

    After step i of n it is floor(T cos(pi/2 i/n)), the cosine schedule of MaskGIT (Chang et al., arXiv 2202.04200)
    that MAR uses. There are never more steps than tokens.
    """
    steps = min(ar_steps, num_tokens)
    counts = [num_tokens]
    for done in range(1, steps):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * done / steps))
        counts.append(max(steps - done, min(counts[-1] - 1, cosine)))
    return (*counts, 0)


def masked_guidance_scales(guidance_scale: float, counts: tuple[int, ...], ramp: str) -> tuple[float, ...]:
    """The scale of each step. `linear`, as MAR: from 1 to w with the share of tokens drawn once it is done.

    w = 0 is the unconditional model, under either ramp: 0 in every step.
    """
    if ramp == "constant" or guidance_scale == 0.0:
        return (guidance_scale,) * (len(counts) - 1)
    return tuple(1.0 + (guidance_scale - 1.0) * (1.0 - after / counts[0]) for after in counts[1:])
