"""Bits for each unit at a given mean, as in MixDQ: an integer programme for each group, and a scan over their shares.

The two groups are measured in different units, so their damages cannot be added. The bits of the content group are
therefore scanned around the mean, and those of the quality group follow from the budget. The candidate is taken whose
images are nearest to those of the original weights. Activations have 8 bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ecar_dist.command_line import columns, say
from ecar_dist.compress.calibration import Calibration
from ecar_dist.compress.model import KEPT, Recipe, quantized_unit
from ecar_dist.compress.report import compare_samples
from ecar_dist.compress.sensitivity import MEASURED_BITS, Group, Meter
from ecar_dist.errors import ConfigError
from ecar_dist.quantize.allocation import (
    Allocation,
    Unit,
    allocate,
    at_random,
    greedy,
    mean_bits,
    predicted_damage,
    uniform,
)
from ecar_dist.quantize.layers import exchange_all, quantizable, tied_units

RATIOS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4)  # bits of the content group divided by the mean
RANDOM = 3  # random allocations


def check_mean_bits(wanted: float) -> None:
    """Raises ConfigError for a mean that no allocation can have."""
    least = min(MEASURED_BITS)
    if not least <= wanted < KEPT:
        raise ConfigError(
            f"--mean-bits {wanted:g} cannot be met: a layer has {', '.join(map(str, MEASURED_BITS))} bits, or {KEPT} "
            f"if it is not quantised; give a number from {least} to below {KEPT}"
        )


def candidates(units: Mapping[str, Unit], groups: Mapping[str, Group], wanted: float) -> list[Allocation]:
    """The allocations with the least damage in each group, for several shares of the budget; no two are the same."""
    parts = [{name: unit for name, unit in units.items() if groups[name] == group} for group in ("content", "quality")]
    content, quality = parts
    budget = sum(unit.weights for unit in units.values()) * wanted / 8.0  # bytes
    if not content or not quality:
        return [allocate(units, budget)]

    found: list[Allocation] = []
    of_content = sum(unit.weights for unit in content.values()) / 8.0  # bytes of one bit
    for ratio in RATIOS:
        share = min(of_content * wanted * ratio, of_content * KEPT)
        try:
            chosen = allocate(content, share) | allocate(quality, budget - share)
        except ConfigError:  # a group would get less than its fewest bits
            continue
        if chosen not in found:
            found.append(chosen)
    return found or [allocate(units, budget)]


class Judge:
    """Draws real samples of a model with given bits in each unit, and restores the model each time."""

    def __init__(self, meter: Meter, calibration: Calibration, recipe: Recipe) -> None:
        self._meter, self._calibration, self._recipe = meter, calibration, recipe
        self._units = tied_units(quantizable(meter.trained.model))

    def with_bits(self, bits: Mapping[str, int], action: Callable[[], Any]) -> Any:
        """What `action` returns while the model has these bits."""
        model = self._meter.trained.model
        rounded: dict[str, nn.Module] = {}
        for unit, number in bits.items():
            if number < KEPT:
                rounded |= quantized_unit(model, self._units[unit], number, self._calibration, self._recipe)
        before = exchange_all(model, rounded)
        try:
            return action()
        finally:
            exchange_all(model, before)

    def paired(self, bits: Mapping[str, int]) -> dict[str, Any]:
        """`compare_samples` with the original weights."""
        return self.with_bits(bits, lambda: compare_samples(self._meter.reference, self._meter.draw()))

    def damage(self, bits: Mapping[str, int], group: Group) -> float:
        return self.with_bits(bits, lambda: self._meter.damage(group))


def choose(
    units: Mapping[str, Unit], groups: Mapping[str, Group], wanted: float, judge: Judge
) -> tuple[Allocation, dict[str, Any]]:
    """The candidate with the highest PSNR, and a report: baselines at equal bits, predicted and real damage."""
    tried = [(judge.paired(bits), bits) for bits in candidates(units, groups, wanted)]
    paired, best = max(tried, key=lambda each: _finite(each[0]["PSNR, dB"]))

    # Baselines with the same budget.
    budget = sum(unit.weights for unit in units.values()) * wanted / 8.0
    rivals = {"uniform": uniform(units, math.floor(wanted)), "greedy by size": greedy(units, budget)}
    rivals |= {f"random {seed}": at_random(units, budget, seed) for seed in range(RANDOM)}
    rows = {"integer programme": {"mean bits": mean_bits(units, best), **paired}}
    for name, bits in rivals.items():
        rows[name] = {"mean bits": mean_bits(units, bits), **judge.paired(bits)}
    return best, {
        "wanted": wanted,
        "candidates": len(tried),
        "comparison": rows,
        "additivity": additivity(units, groups, best, judge),
    }


def additivity(
    units: Mapping[str, Unit], groups: Mapping[str, Group], bits: Allocation, judge: Judge
) -> dict[str, dict[str, float]]:
    """By group: the sum of the damages measured one unit at a time, and the damage of all units together."""
    found: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(groups.values()):
        part = {name: number for name, number in bits.items() if groups[name] == group}
        predicted = predicted_damage({name: units[name] for name in part}, part)
        found[group] = {"predicted": predicted, "real": judge.damage(part, group)}
    return found


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def print_choice(bits: Allocation, report: Mapping[str, Any]) -> None:
    """Print it to the screen."""
    counts = {number: list(bits.values()).count(number) for number in sorted(set(bits.values()))}
    say("units by bits: " + ", ".join(f"{number}: {count}" for number, count in counts.items()))
    rows = [["at equal mean bits", *next(iter(report["comparison"].values()))]]
    for name, numbers in report["comparison"].items():
        rows.append([name, *("equal" if value is None else f"{value:.4g}" for value in numbers.values())])
    for line in columns(rows):
        say(line)
    for group, damage in report["additivity"].items():
        say(f"{group} damage: predicted {damage['predicted']:.3g}, real {damage['real']:.3g}")
