"""Counts what one step asks of the device: kernels, bytes and host reads. It watches the dispatched operators.

The counts are those of eager code, on any device. A host read is a place where the host would wait for a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# They allocate, or make a view: no kernel runs.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"}
_READ_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
_TORCH = str(Path(torch.__file__).parent)
_ROOT = str(Path(__file__).resolve().parents[1])


class OperatorCount:
    """In a `with` block, counts the operators of this thread, and of the backward passes that it starts.

    kernels: operators that read or write memory. A `_foreach_` operator counts once, although a GPU may need
        several launches for it.
    bytes: of the tensors that these operators read, and of those that they write. Broadcast elements count once.
    reads: for each place in the code, how often it reads a number from the device. AdamW's step counters are
        excluded while they are on the host.
    synchronisations: calls of `torch.cuda.synchronize`, or of its counterpart on CPU.
    waits: on a GPU, how often CUDA itself saw an operator wait for the device; None without a GPU.
    """

    def __init__(self) -> None:
        self.kernels = 0
        self.bytes = 0
        self.reads: Counter[str] = Counter()
        self.synchronisations = 0
        self.waits: int | None = None
        self._ends = contextlib.ExitStack()
        self._calls = _Calls(self)
        self._operators = _Operators(self)
        self._waits = _Waits(self)

    def __enter__(self) -> OperatorCount:
        if torch.cuda.is_available():
            warned = self._ends.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._ends.callback(self._count_waits, warned)
            self._ends.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        self._waits.start()
        self._ends.callback(self._waits.stop)
        self._ends.enter_context(self._calls)
        self._ends.enter_context(self._operators)
        return self

    def __exit__(self, *error: Any) -> None:
        self._ends.close()

    def _count_waits(self, warned: Sequence[warnings.WarningMessage]) -> None:
        self.waits = sum("synchronizing CUDA operation" in str(one.message) for one in warned)

    def summary(self) -> dict[str, Any]:
        return {
            "kernels": self.kernels,
            "gigabytes": self.bytes / 1e9,
            "host_reads": sum(self.reads.values()),
            "synchronisations": self.synchronisations,
            "waits_seen_by_cuda": self.waits,
            "host_reads_by_place": dict(self.reads.most_common()),
        }

    def read(self, tensor: Any) -> None:
        """Record that a number of `tensor` is read. AdamW's step counters do not count while they are on the host."""
        place = _place()
        on_device = isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu"
        if on_device or not place.startswith("torch/optim/"):
            self.reads[place] += 1


class _Operators(TorchDispatchMode):
    """Sees every operator below autograd."""

    def __init__(self, count: OperatorCount) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _READ_OPERATORS:
            self._count._calls.read_below(args[0])
        elif name not in _NO_KERNEL and not func.is_view and torch.Tag.inplace_view not in func.tags:
            self._count.kernels += 1
            self._count.bytes += _bytes(func, (*args, *(kwargs or {}).values()), found)
        return found


class _Calls(TorchFunctionMode):
    """Sees the methods that read a tensor: on CPU `tolist` dispatches no operator."""

    def __init__(self, count: OperatorCount) -> None:
        super().__init__()
        self._count = count
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside or getattr(func, "__name__", "") not in _READS:
            return func(*args, **(kwargs or {}))
        self._count.read(args[0])
        self._inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._inside = False

    def read_below(self, tensor: torch.Tensor) -> None:
        """Record that an operator read `tensor`, unless a method has already counted it."""
        if not self._inside:
            self._count.read(tensor)


class _Waits:
    """Replaces the `synchronize` of CUDA, and of DeepSpeed's accelerator, with one that counts."""

    def __init__(self, count: OperatorCount) -> None:
        self._count = count
        self._replaced: list[tuple[Any, str, Callable[..., Any]]] = []

    def start(self) -> None:
        module = sys.modules.get("deepspeed.accelerator.real_accelerator")
        accelerator = module and module.get_accelerator()
        for owner in (torch.cuda, torch.cpu, accelerator):
            if owner is not None:
                self._replace(owner, "synchronize")

    def stop(self) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)
        self._replaced = []

    def _replace(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        inside = False

        def counting(*arguments: Any, **keywords: Any) -> Any:
            nonlocal inside
            self._count.synchronisations += not inside
            inside = True
            try:
                return original(*arguments, **keywords)
            finally:
                inside = False

        self._replaced.append((owner, name, original))
        setattr(owner, name, counting)


def _bytes(func: Any, inputs: Iterable[Any], outputs: Any) -> int:
    """What an operator reads and writes; an argument that it writes to counts as both."""
    read = sum(_size(tensor) for tensor in tree_iter(list(inputs)) if isinstance(tensor, torch.Tensor))
    written = sum(_size(tensor) for tensor in tree_iter(outputs) if isinstance(tensor, torch.Tensor))
    if outputs is None:  # a `_foreach_` operator in place
        written = sum(_size(tensor) for tensor in tree_iter(inputs[0]) if isinstance(tensor, torch.Tensor))
    return read + written


def _size(tensor: torch.Tensor) -> int:
    """Bytes of the elements that have their own address."""
    own = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        own *= size if stride else 1
    return own * tensor.element_size()


def _place() -> str:
    """File and line of the innermost frame outside torch and this file; in torch.optim, the optimizer's file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{_TORCH}/optim/"):
            return f"torch/optim/{Path(name).name}"
        if name != __file__ and not name.startswith(_TORCH):
            return f"{_short(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _short(name: str) -> str:
    if name.startswith(_ROOT):
        return name[len(_ROOT) + 1 :]
    return name.rpartition("/site-packages/")[2]
