"""Which layers of a network are quantised, and how they are replaced.

These are the projections in the transformer blocks (queries, keys and values, the output of attention, both matrices of
the MLP), and the projection of the token maps. Embedders, adaLN and the last layer are not quantised, as in ViDiT-Q:
they take little time, and every token passes through them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ecar_dist.quantize.linear import QuantizedLinear

_IN_A_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.")
_PROJECTIONS_OF_MAPS = "condition_projection"
_KEPT = "modulation"  # adaLN, which is in the blocks too
_TIED = re.compile(r"\.(q|k|v|query|key|value)$")


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised, by name, in the order of the model."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_quantized(name)
    }


def _is_quantized(name: str) -> bool:
    parts = name.split(".")
    if any(_KEPT in part for part in parts):
        return False
    return _IN_A_BLOCK.search(name) is not None or parts[-1] == _PROJECTIONS_OF_MAPS


def tied_units(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layers that must share their bits, by the name of the unit: separate projections to queries, keys and values.

    They read the same tokens, so they share the factors of those. A fused projection is a unit by itself.
    """
    units: dict[str, tuple[str, ...]] = {}
    for name in names:
        unit = _TIED.sub(".qkv", name)
        units[unit] = (*units.get(unit, ()), name)
    return units


def exchange(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the layer `name` by `module`. Returns the old layer."""
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    old = getattr(holder, last)
    setattr(holder, last, module)
    return old


def exchange_all(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """`exchange` for several layers. Returns the old layers; exchanging those again restores the model."""
    return {name: exchange(model, name, module) for name, module in layers.items()}


def shaped_like(model: nn.Module, layers: Mapping[str, tuple[int, bool]]) -> None:
    """Replace layers by quantised ones without values, to be filled from a file. layers: name -> (bits, rotated).

    Raises KeyError with the name of a layer that the model does not quantise.
    """
    found = quantizable(model)
    for name, (bits, rotated) in layers.items():
        linear = found[name]
        made = QuantizedLinear(
            linear.in_features, linear.out_features, weight_bits=bits, rotated=rotated, bias=linear.bias is not None
        )
        exchange(model, name, made)
