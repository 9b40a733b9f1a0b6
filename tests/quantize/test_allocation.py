"""The integer programme compared with every possible allocation, and its baselines."""

import itertools
import random

import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.quantize.allocation import (
    Unit,
    allocate,
    at_random,
    bits_of,
    greedy,
    mean_bits,
    predicted_damage,
    uniform,
)

CHOICES = (4, 8, 16)


def make_units(count, seed):
    draw = random.Random(seed)
    units = {}
    for number in range(count):
        damage = draw.uniform(0.1, 3.0)
        ladder = {4: damage, 8: damage * draw.uniform(0.01, 0.5), 16: 0.0}
        time = {4: draw.uniform(1, 2), 8: 1.0, 16: draw.uniform(1, 3)}
        units[f"layer{number}"] = Unit(draw.choice([256, 512, 1024, 3000]), ladder, time)
    return units


def best_of_all(units, budget, milliseconds=None):
    found = []
    for bits in itertools.product(CHOICES, repeat=len(units)):
        chosen = dict(zip(units, bits, strict=True))
        time = sum(unit.milliseconds[chosen[name]] for name, unit in units.items())
        if bits_of(units, chosen) <= 8 * budget and (milliseconds is None or time <= milliseconds):
            found.append((predicted_damage(units, chosen), chosen))
    return min(found, key=lambda each: each[0])


def budget_of(units, bits):
    return sum(unit.weights for unit in units.values()) * bits / 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [4.0, 5.0, 7.3, 16.0])
def test_eight_layers_get_what_trying_everything_finds(seed, bits):
    units = make_units(8, seed)
    budget = budget_of(units, bits)
    chosen = allocate(units, budget)
    assert predicted_damage(units, chosen) == pytest.approx(best_of_all(units, budget)[0], abs=1e-9)
    assert mean_bits(units, chosen) <= bits + 1e-9


def test_a_second_row_limits_the_time():
    units = make_units(8, seed=1)
    budget = budget_of(units, 8)
    chosen = allocate(units, budget, budget_milliseconds=9.0)
    time = sum(unit.milliseconds[chosen[name]] for name, unit in units.items())
    assert time <= 9.0 + 1e-9
    assert predicted_damage(units, chosen) == pytest.approx(best_of_all(units, budget, 9.0)[0], abs=1e-9)
    assert chosen != allocate(units, budget)


def test_a_planted_sensitive_layer_gets_the_most_bits():
    units = {f"layer{n}": Unit(1000, {4: 0.1, 8: 0.01, 16: 0.0}) for n in range(10)}
    units["layer3"] = Unit(1000, {4: 50.0, 8: 5.0, 16: 0.0})
    chosen = allocate(units, budget_of(units, 6.0))
    assert chosen["layer3"] == 16
    assert max(bits for name, bits in chosen.items() if name != "layer3") < 16


def test_no_rival_at_equal_bits_is_better():
    units = make_units(30, seed=5)
    budget = budget_of(units, 5.0)
    best = predicted_damage(units, allocate(units, budget))
    rivals = [greedy(units, budget), *(at_random(units, budget, seed) for seed in range(3))]
    for rival in rivals:
        assert bits_of(units, rival) <= 8 * budget
        assert mean_bits(units, rival) > 4.5
        assert best <= predicted_damage(units, rival)
    assert set(uniform(units, 5).values()) == {5}


def test_budgets_that_cannot_be_met_name_the_least(capsys):
    units = make_units(4, seed=2)
    with pytest.raises(ConfigError, match=r"3 bits per weight.*at least 4 bits"):
        allocate(units, budget_of(units, 3.0))
    with pytest.raises(ConfigError, match=r"3 bits per weight.*at least 4 bits"):
        greedy(units, budget_of(units, 3.0))
    with pytest.raises(ConfigError, match=r"0\.5 ms.*takes 4 ms"):
        allocate(units, budget_of(units, 8.0), budget_milliseconds=0.5)
