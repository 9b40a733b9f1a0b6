"""Average velocities: a network that crosses an interval of a stage in one call; section 11 of docs/ecar.md.

U(x, a, h) is the mean of dx/du along the path that leaves x at time a, over the interval [a, a + h]:

    U(x_a, a, h) = (1/h) int_a^{a+h} v(x_u, u) du,    so that    x_{a+h} = x_a + h U(x_a, a, h).

At h = 0 it is the velocity v itself (Geng et al., "Mean flows", arXiv 2505.13447). The functions here work on lists of
stages, with states [B, C, h_k, w_k] and scalars [B], because training computes all stages in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

TO_THE_END = 0.25  # share of the intervals that end at u = 1: sampling with one call per stage needs them most

Tensors = Sequence[torch.Tensor]
MeanVelocityFn = Callable[[Tensors, Tensors, Tensors], list[torch.Tensor]]  # (states, times a, lengths h) -> U


@dataclass(frozen=True)
class Interval:
    """One interval per sample, in the time u of its stage; each [B]."""

    start: torch.Tensor  # a
    length: torch.Tensor  # h; 0 where the sample learns the velocity at a
    split: torch.Tensor  # the share of the interval before its split point m, in (0, 1)

    @staticmethod
    def draw(u: torch.Tensor, uniform: torch.Tensor, instant_share: float, whole_share: float = 0.0) -> Interval:
        """An interval between u [B] and another time, from uniform [B, 4], all U(0, 1).

        A share `instant_share` has length 0 and starts at u. Of the others, a share `whole_share` spans the full stage.
        """
        other, split, kind, end = uniform.unbind(1)

        # Between the two times, whichever comes first; or from u to the end of the stage.
        start = torch.minimum(u, other)
        length = (u - other).abs()
        to_the_end = end < TO_THE_END
        start = torch.where(to_the_end, u, start)
        length = torch.where(to_the_end, 1.0 - u, length)

        # The full stage: sampling with one call per stage uses it, and the other intervals never span it.
        whole = end >= 1.0 - whole_share
        start = torch.where(whole, 0.0, start)
        length = torch.where(whole, 1.0, length)

        # An interval of length 0: the velocity at u.
        is_instant = kind < instant_share
        return Interval(torch.where(is_instant, u, start), torch.where(is_instant, 0.0, length), split)


def splitting_targets(
    mean_velocity: MeanVelocityFn, states: Tensors, velocities: Tensors, intervals: Sequence[Interval]
) -> list[torch.Tensor]:
    """The targets of U(x_a, a, h), from U over the two parts of the interval; K of [B, C, h_k, w_k].

    Displacements add up (SplitMeanFlow, arXiv 2507.16884, eq. 9): with s the share of the first part and m = a + s h,

        U(x_a, a, h) = s U(x_a, a, s h) + (1 - s) U(x_m, m, (1 - s) h),    x_m = x_a + s h U(x_a, a, s h).

    Where h = 0 the target is the velocity of the path instead (`velocities`, the targets of flow matching), which ties
    U to the data. No gradient flows through a target. Two forward passes are enough: no derivative of U is taken.
    """
    with torch.no_grad():
        # The first part, and the point where it ends.
        first_lengths = [each.split * each.length for each in intervals]
        first = mean_velocity(states, [each.start for each in intervals], first_lengths)
        middles = [x + _wide(h) * u for x, h, u in zip(states, first_lengths, first, strict=True)]

        # The second part, from there.
        middle_times = [each.start + h for each, h in zip(intervals, first_lengths, strict=True)]
        second_lengths = [each.length - h for each, h in zip(intervals, first_lengths, strict=True)]
        second = mean_velocity(middles, middle_times, second_lengths)

        # Both, weighted by their lengths; or the velocity.
        targets = []
        for each, u, v, velocity in zip(intervals, first, second, velocities, strict=True):
            split = _wide(each.split)
            targets.append(torch.where(_wide(each.length) > 0.0, split * u + (1.0 - split) * v, velocity))
        return targets


def _wide(number: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, 1, 1]."""
    return number.view(-1, 1, 1, 1)
