"""The order in which PAR draws tokens: a few one by one, then groups of distant tokens at once. Does not import torch.

The order, the groups and the marker slots are those of parallelised autoregression (PAR: Wang et al., arXiv
2412.15119). The grid is cut into n equal regions. Tokens of one group have the same place in each region, so they are
far apart, and nearly independent of each other given everything drawn before.
"""

from __future__ import annotations

import math

GROUPS = (1, 4, 16)  # n; the side of a region is side / sqrt(n)


def check_group(side: int, group: int) -> None:
    """Raises ValueError if a grid of side x side tokens cannot be cut into `group` equal regions."""
    across = math.isqrt(group)
    if side % across or side == across:
        raise ValueError(
            f"par.group={group} cuts the grid into {across} x {across} regions, but it has {side} x {side} tokens; "
            f"the side must be a multiple of {across} and larger than it; set par.group=1, or change data.latent_size "
            "or model.patch_size"
        )


def region_order(side: int, group: int) -> tuple[int, ...]:
    """Row-major places of the grid's tokens, in drawing order.

    The place within a region is the outer loop, the region the inner one; both run row by row. n = 1 is raster order.
    """
    across = math.isqrt(group)
    region = side // across
    return tuple(
        (region_row * region + row) * side + region_column * region + column
        for row in range(region)
        for column in range(region)
        for region_row in range(across)
        for region_column in range(across)
    )


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """The position of each place in the order; it restores the grid."""
    positions = [0] * len(order)
    for position, place in enumerate(order):
        positions[place] = position
    return tuple(positions)


def group_sizes(num_tokens: int, group: int) -> tuple[int, ...]:
    """How many tokens each step draws: n steps of one token, then (N - n) / n steps of n tokens."""
    return (1,) * group + (group,) * ((num_tokens - group) // group)


def slot_sources(num_tokens: int, group: int) -> tuple[int, ...]:
    """The input of each slot of the sequence, as a row of the table (class, M_1 .. M_{n-1}, x_0 .. x_{N-1}).

    Slot j gives the distribution of token j of the order, and attends to the slots of its own group and of earlier
    ones. So its input must be known before its group is drawn: the class for j = 0, token j - 1 up to j = n, the
    marker M_{j-n} for the rest of the first group, and token j - n, of the same region, for all later ones.
    """
    first_token = group  # the class and n - 1 markers come first
    sequential = [first_token + slot - 1 for slot in range(1, group + 1)]
    markers = list(range(1, group))
    regions = [first_token + slot - group for slot in range(2 * group, num_tokens)]
    return (0, *sequential, *markers, *regions)[:num_tokens]
