"""Faster sampling: weights cast to bf16 once, and a model compiled once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import KINDS
from ecar_dist.models.staged import StagedModel
from ecar_dist.sample.sampling_plan import SamplingPlan

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextlib.contextmanager
def private_cache() -> Iterator[None]:
    """Compile in a temporary folder, unless the user has chosen one.

    All processes of a user share the compiler's default folder. A process that is killed while it compiles leaves
    truncated libraries there, which make later ones fail.
    """
    before = os.environ.get(CACHE_VARIABLE)
    # torch sets the variable to the default when it is imported.
    if before not in (None, default_cache_dir()):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ecar-compiled-", ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            os.environ[CACHE_VARIABLE] = before or default_cache_dir()


def prepare(model: nn.Module, plan: SamplingPlan, device: torch.device, *, compiled: bool) -> Any:
    """The model that `generate` should use to draw many batches: `model` itself, or its compiled form.

    Under bf16 the matrices of `model` are rounded in place. Raises ConfigError if it cannot be compiled.
    """
    if plan.bf16:
        round_matrices(model)
    if not compiled:
        return model
    if not KINDS[plan.kind].compilable:
        raise ConfigError(f"model.kind={plan.kind} cannot be compiled, its steps differ in size; leave --compile out")
    if fault := compiler_fault(device):
        cache = os.environ.get(CACHE_VARIABLE)
        hint = f", or empty {cache}" if cache and cache in fault else ""
        raise ConfigError(f"nothing can be compiled on {device.type} here ({fault}); leave --compile out{hint}")
    return CompiledModel(model, device)  # type: ignore[arg-type]  # a sampler of stages has a model of stages


def round_matrices(model: nn.Module) -> None:
    """Cast the linear maps to bf16, in place.

    Under bf16 autocast no sample changes by a bit: autocast rounds the same weights in the same way, but in every call
    of the network.
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
        # Not a CUDA graph: the next replay would overwrite the keys and values that the cache holds.
        self.begin_stage = _compile(model.begin_stage)
        self._velocity = _compile(model.velocity, mode="reduce-overhead" if device.type == "cuda" else None)

    def velocity(
        self, x: torch.Tensor, time: torch.Tensor, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """See `StagedModel`."""
        # A copy, because the next replay writes to the same memory, and a solver may still use this result.
        return self._velocity(x, time, stage, condition, labels).clone()


def compiler_fault(device: torch.device) -> str | None:
    """One line on why torch.compile does not work here, e.g. without a C++ compiler; None if it works."""
    try:
        _compile(torch.sin)(torch.zeros(4, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # OSError, ImportError: a library that cannot be loaded
        return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return None


def _compile(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
