"""From a trained model and its calibration to a quantised model."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ecar_dist.compress.calibration import Calibration
from ecar_dist.quantize.layers import quantizable, tied_units
from ecar_dist.quantize.linear import QuantizedLinear
from ecar_dist.quantize.transform import balance_factors, random_signs

KEPT = 16  # "bits" of a layer that stays as it is


@dataclass(frozen=True)
class Recipe:
    """How layers are transformed before they are rounded. alpha: None for no balance. seed: of the signs."""

    alpha: float | None = 0.3
    rotates: bool = True
    seed: int = 0


def quantized_unit(
    model: nn.Module, layers: tuple[str, ...], bits: int, calibration: Calibration, recipe: Recipe
) -> dict[str, QuantizedLinear]:
    """The layers of a unit, quantised. They read the same tokens, so they share balance and signs."""
    linears = {name: model.get_submodule(name) for name in layers}
    weight_max = torch.stack([linear.weight.abs().amax(0) for linear in linears.values()]).amax(0)  # type: ignore[operator]

    # Balance for everything that the calibration has seen, and the unit's own signs.
    balance = None
    if recipe.alpha is not None:
        balance = balance_factors(calibration.largest(layers[0]).to(weight_max), weight_max, recipe.alpha)
    seed = zlib.crc32(layers[0].encode()) ^ recipe.seed
    signs = random_signs(len(weight_max), seed) if recipe.rotates else None
    return {
        name: QuantizedLinear.of(linear, bits, balance=balance, signs=signs)  # type: ignore[arg-type]
        for name, linear in linears.items()
    }


def quantized_model(model: nn.Module, bits: Mapping[str, int], calibration: Calibration, recipe: Recipe) -> nn.Module:
    """A copy of the model with the given bits in each unit; `KEPT` leaves a unit as it is."""
    # Replaced matrices are not copied.
    units = {name: layers for name, layers in tied_units(quantizable(model)).items() if bits[name] < KEPT}
    exchanged = {
        name: module
        for unit, layers in units.items()
        for name, module in quantized_unit(model, layers, bits[unit], calibration, recipe).items()
    }
    memo = {id(model.get_submodule(name)): module for name, module in exchanged.items()}
    return copy.deepcopy(model, memo)
