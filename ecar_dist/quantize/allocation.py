"""How many bits each layer gets: an integer programme (MixDQ: Zhao et al., arXiv 2405.17873, section 3.3), baselines.

    min  sum_u sum_b c_ub D_ub    subject to    sum_b c_ub = 1,   sum_ub c_ub n_u b <= budget,   c in {0, 1}

D_ub is the damage of unit u at b bits, measured with all other units unchanged. The programme adds these damages, so it
is only as good as the assumption that they are additive. MixDQ maximises a sum of SQNR or SSIM; a damage here is
1 - SSIM, or the power of the noise over that of the signal.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ecar_dist.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """Layers that share their bits. damage: by bits; milliseconds: of one call, by bits, if they were measured."""

    weights: int
    damage: Mapping[int, float]
    milliseconds: Mapping[int, float] | None = None


Allocation = dict[str, int]  # bits of each unit


def bits_of(units: Mapping[str, Unit], chosen: Mapping[str, int]) -> int:
    """Bits of all weights."""
    return sum(unit.weights * chosen[name] for name, unit in units.items())


def mean_bits(units: Mapping[str, Unit], chosen: Mapping[str, int]) -> float:
    """Bits per weight."""
    return bits_of(units, chosen) / sum(unit.weights for unit in units.values())


def predicted_damage(units: Mapping[str, Unit], chosen: Mapping[str, int]) -> float:
    """The sum of the damages measured one at a time."""
    return sum(unit.damage[chosen[name]] for name, unit in units.items())


def allocate(units: Mapping[str, Unit], budget_bytes: float, budget_milliseconds: float | None = None) -> Allocation:
    """The allocation with the least damage within the budget, which counts only the weights.

    Raises ConfigError if even the fewest bits exceed a budget.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check_budget(units, budget_bytes, budget_milliseconds)

    # One variable for each unit and number of bits.
    choices = [(name, bits) for name, unit in units.items() for bits in sorted(unit.damage)]
    damage = np.array([units[name].damage[bits] for name, bits in choices])
    one_each = np.array([[float(name == row) for name, _ in choices] for row in units])
    size = np.array([units[name].weights * bits / 8.0 for name, bits in choices])

    # One choice per unit, within the budget. Numbers near 1 suit the solver's tolerances.
    rules = [LinearConstraint(one_each, 1.0, 1.0), LinearConstraint(size / budget_bytes, -np.inf, 1.0)]
    if budget_milliseconds is not None:
        time = np.array([(units[name].milliseconds or {})[bits] for name, bits in choices])
        rules.append(LinearConstraint(time / budget_milliseconds, -np.inf, 1.0))
    scale = max(float(damage.max()), 1e-30)
    found = milp(
        damage / scale, constraints=rules, integrality=1, bounds=Bounds(0.0, 1.0), options={"mip_rel_gap": 0.0}
    )
    if found.x is None:
        raise ConfigError(f"no allocation meets both budgets ({found.message}); raise one of them")
    return {name: bits for (name, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5}


def _check_budget(units: Mapping[str, Unit], budget_bytes: float, budget_milliseconds: float | None) -> None:
    fewest = {name: min(unit.damage) for name, unit in units.items()}
    least = bits_of(units, fewest) / 8.0
    if least > budget_bytes * (1 + 1e-12):
        offered = sorted({bits for unit in units.values() for bits in unit.damage})
        wanted = 8.0 * budget_bytes / sum(unit.weights for unit in units.values())
        raise ConfigError(
            f"a budget of {wanted:.4g} bits per weight ({budget_bytes:,.0f} bytes) cannot be met: bits are one of "
            f"{', '.join(map(str, offered))}, so the weights need at least {mean_bits(units, fewest):.4g} bits each "
            f"({least:,.0f} bytes); give that or more"
        )
    if budget_milliseconds is not None:
        fastest = sum(min((unit.milliseconds or {}).values()) for unit in units.values())
        if fastest > budget_milliseconds:
            raise ConfigError(
                f"a budget of {budget_milliseconds:.4g} ms cannot be met: the fastest choice of every layer takes "
                f"{fastest:.4g} ms; give that or more"
            )


def uniform(units: Mapping[str, Unit], bits: int) -> Allocation:
    """The same bits for all units."""
    return dict.fromkeys(units, bits)


def greedy(units: Mapping[str, Unit], budget_bytes: float) -> Allocation:
    """By size alone: the smallest units are raised to the most bits first, as long as the budget lasts."""
    return _raised(units, sorted(units, key=lambda name: units[name].weights), budget_bytes)


def at_random(units: Mapping[str, Unit], budget_bytes: float, seed: int) -> Allocation:
    """Units are raised to the most bits in a random order, as long as the budget lasts."""
    order = list(units)
    random.Random(seed).shuffle(order)
    return _raised(units, order, budget_bytes)


def _raised(units: Mapping[str, Unit], order: Sequence[str], budget_bytes: float) -> Allocation:
    _check_budget(units, budget_bytes, None)
    chosen = {name: min(unit.damage) for name, unit in units.items()}
    for name in order:
        for bits in sorted(units[name].damage, reverse=True):
            raised = {**chosen, name: bits}
            if bits_of(units, raised) <= 8.0 * budget_bytes:
                chosen = raised
                break
    return chosen
