"""A stand-in for a GPU: tensors "on" it are computed on the CPU, and what a GPU would refuse is refused.

So a test can check that code stays on a device without having one. The numbers are bit-identical to the CPU's,
including gradients.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

# A device type that torch knows and autograd runs in the caller's thread, but that has no kernels.
DEVICE = torch.device("lazy")


class OnDevice(torch.Tensor):
    """A tensor that reports DEVICE as its device; `values_here` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, real.shape, device=DEVICE, **layout)

    def __init__(self, real):
        self.values_here = real

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `with PretendDevice()`")


class PretendDevice(TorchDispatchMode):
    """DEVICE exists while it is active.

    on_host: calls of each operation whose tensors were all on the CPU, by name.
    to_host: bytes copied to the host, not counting numbers that were read one by one.
    """

    def __init__(self):
        super().__init__()
        self.on_host = Counter()
        self.to_host = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        on_device = [isinstance(one, OnDevice) for one in tensors]

        # Where the result is: on the requested device, else with the arguments. Only copies move between devices.
        target = kwargs.get("device")
        there = torch.device(target) == DEVICE if target is not None else any(on_device[:1] or on_device)
        if name in ("_to_copy", "copy_"):
            self.to_host += sum(one.nbytes for one in tensors[-1:] if on_device[-1] and not there)
        elif any(on_device):
            # A number on the host may take part; a tensor may not.
            strangers = [one for one, there_too in zip(tensors, on_device, strict=True) if not there_too and one.dim()]
            assert not strangers, f"{func}: a tensor {list(strangers[0].shape)} on the host among those on the device"
            there = True

        if there and target is not None:
            kwargs["device"] = "cpu"
        real_args, real_kwargs = tree_map_only(OnDevice, lambda one: one.values_here, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        if not any(on_device) and not there:
            results = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
            self.on_host[name] += any(one.is_cpu for one in (*tensors, *results))
        if not there or name == "_local_scalar_dense":
            return out
        out = tree_map_only(torch.Tensor, OnDevice, out)
        return return_and_correct_aliasing(func, args, kwargs, out)
