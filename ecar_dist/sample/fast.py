"""Drawing made faster: bf16 weights that are cast once, and a model that is compiled once."""

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
    """What is compiled in the block lies in a folder of its own, which is removed at the end.

    The compiler's default folder is one for all processes of a user, and a process that is killed while it compiles
    leaves torn libraries there, which fail all later ones. A folder that the user has chosen is used, and kept.
    """
    before = os.environ.get(CACHE_VARIABLE)
    if before not in (None, default_cache_dir()):  # torch, when it is imported, sets it to the default
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ecar-compiled-", ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            os.environ[CACHE_VARIABLE] = before or default_cache_dir()


def prepare(model: nn.Module, plan: SamplingPlan, device: torch.device, *, compiled: bool) -> Any:
    """What `generate` is to be given to draw many batches: `model`, whose matrices may be rounded in place, or its
    compiled form. Raises ConfigError where it cannot be compiled."""
    if plan.bf16:
        round_matrices(model)
    if not compiled:
        return model
    if not KINDS[plan.kind].compilable:
        raise ConfigError(f"model.kind={plan.kind} draws another number of tokens each step; leave --compile out")
    if fault := compiler_fault(device):
        cache = os.environ.get(CACHE_VARIABLE)
        hint = f", or empty {cache}" if cache and cache in fault else ""
        raise ConfigError(f"nothing can be compiled on {device.type} here ({fault}); leave --compile out{hint}")
    return CompiledModel(model, device)  # type: ignore[arg-type]  # a sampler of stages has a model of stages


def round_matrices(model: nn.Module) -> None:
    """Hold the linear maps in bf16, in place.

    Under bf16 autocast no sample changes by a bit: autocast rounds the same weights in the same way, but anew in each
    call of the network.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


class CompiledModel:
    """A model of stages as compiled code, for `draw_stages`: one graph for each stage and each shape of batch.

    The code lives as long as this object does, so give every batch the same size: another one compiles anew, minutes
    for a large model. On a GPU the velocity is a CUDA graph, one launch a call. Equal to the model but for rounding.
    """

    def __init__(self, model: StagedModel, device: torch.device) -> None:
        self.start_cache = model.start_cache
        # Not a CUDA graph: the next replay would take the memory of the keys and values that the cache holds.
        self.begin_stage = _compile(model.begin_stage)
        self._velocity = _compile(model.velocity, mode="reduce-overhead" if device.type == "cuda" else None)

    def velocity(
        self, x: torch.Tensor, time: torch.Tensor, stage: int, condition: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """As the model's."""
        # A copy, because the next replay writes where this one did, and a solver may still hold the first result.
        return self._velocity(x, time, stage, condition, labels).clone()


def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work here, in a line, e.g. for want of a C++ compiler; None where it works."""
    try:
        _compile(torch.sin)(torch.zeros(4, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # the last two: a library there that cannot be loaded
        return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return None


def _compile(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
