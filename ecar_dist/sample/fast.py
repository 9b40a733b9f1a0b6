"""Faster sampling: weights cast to bf16 once, and a model compiled once."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import KINDS
from ecar_dist.models.staged import StagedModel
from ecar_dist.runtime.compiler import CACHE_VARIABLE, compiled, compiler_fault
from ecar_dist.sample.sampling_plan import SamplingPlan


def prepare(model: nn.Module, plan: SamplingPlan, device: torch.device, *, compiles: bool) -> Any:
    """The model that `generate` should use to draw many batches: `model` itself, or its compiled form.

    Under bf16 the matrices of `model` are rounded in place. Raises ConfigError if it cannot be compiled.
    """
    if plan.bf16:
        round_matrices(model)
    if not compiles:
        return model
    if not KINDS[plan.kind].compilable:
        raise ConfigError(f"model.kind={plan.kind} cannot be compiled: its steps differ in size; leave --compile out")
    if plan.merge_ratio:
        raise ConfigError(
            f"sample.merge_ratio={plan.merge_ratio:g} cannot be compiled; leave --compile out, or set it to 0"
        )
    if fault := compiler_fault(device):
        cache = os.environ.get(CACHE_VARIABLE)
        hint = f", or empty {cache}" if cache and cache in fault else ""
        raise ConfigError(f"nothing can be compiled on {device.type} here ({fault}); leave --compile out{hint}")
    return CompiledModel(model, device)  # type: ignore[arg-type]  # a staged sampler has a staged model


def round_matrices(model: nn.Module) -> None:
    """Cast the linear maps to bf16, in place.

    Under bf16 autocast the samples stay the same, bit for bit: autocast rounds the same weights in the same way, but in
    every call of the network.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


class CompiledModel:
    """A compiled `StagedModel`: one graph for each stage and each batch size.

    Give every batch the same size, because each new size is compiled, which takes minutes for a large model. On a GPU
    the velocity is a CUDA graph, one launch per call. Results equal the model's up to rounding.
    """

    def __init__(self, model: StagedModel, device: torch.device) -> None:
        self.start_cache = model.start_cache
        if hasattr(model, "modulations"):
            self.modulations = model.modulations
        # Not a CUDA graph: the next replay would overwrite the keys and values in the cache.
        self.begin_stage = compiled(model.begin_stage)
        self._velocity = compiled(model.velocity, mode="reduce-overhead" if device.type == "cuda" else None)

    def velocity(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        stage: int,
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `StagedModel`."""
        more = {"lengths": lengths, "modulations": modulations}
        given = {name: value for name, value in more.items() if value is not None}
        # A copy, because the next replay writes to the same memory, and a solver may still use this result.
        return self._velocity(x, time, stage, condition, labels, **given).clone()
