"""torch.compile: where its files go, whether it works here, and which parts of a model are compiled for training."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ecar_dist.errors import ConfigError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS = 64  # of one kind of block: one for each input shape; torch's default limit is 8


@contextlib.contextmanager
def private_cache() -> Iterator[None]:
    """Compile in a temporary folder, unless the user has chosen one.

    All processes of a user share the compiler's default folder. A process that is killed while it compiles leaves
    truncated libraries there, which make later processes fail.
    """
    # The compiler takes as long to import as the rest of torch, so a command that compiles nothing does not import it.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

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


def compiler_fault(device: torch.device) -> str | None:
    """One line on why torch.compile does not work here, e.g. without a C++ compiler; None if it works."""
    try:
        compiled(torch.sin)(torch.zeros(4, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # OSError, ImportError: a library that cannot be loaded
        return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return None


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError if nothing can be compiled for training on the device here."""
    if fault := compiler_fault(device):
        raise ConfigError(f"nothing can be compiled on {device.type} here ({fault}); set train.compile=false")


def compiled(function: Callable[..., Any], mode: str | None = None, backend: str = "inductor") -> Callable[..., Any]:
    """`function`, compiled as one graph for each set of shapes; code that does not fit in one graph is an error."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, backend=backend)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of all module lists: the transformer blocks, and those of a flow head."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each repeated block, in place. Blocks that differ only in their weights share their graphs.

    The model as a whole is not compiled: its backward pass would be one function, so all gradients would live until its
    end, and none could be sent while others are computed. Nor is the module's `__call__`, which runs DeepSpeed's hooks.
    """
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in repeated_blocks(model):
        block.forward = compiled(block.forward, backend=backend)
