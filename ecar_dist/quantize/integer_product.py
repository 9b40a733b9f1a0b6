"""The product of two int8 matrices. This is the only place that calls the integer kernel.

CUDA's `torch._int_mm` refuses products with 16 or fewer rows, and inner or outer sizes that are not multiples of 8. A
CPU accepts all of them, so no test on a CPU sees the refusal. Everything is therefore padded here before the call.

On a CPU without int8 instructions (VNNI) torch's integer product is a plain loop, about thirty times slower than one in
float32. There the same integers are computed as float32, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SMALLEST_ROWS = 17  # that the CUDA kernel accepts
MULTIPLE = 8  # of the inner and the outer size
EXACT_INNER = 1024  # 1024 products of at most 128 * 128 add up to 2^24, below which float32 holds every integer
CPU_HAS_INT8 = bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x int8 [M, K] times the transpose of weight int8 [N, K], exactly: int32 [M, N]."""
    if x.device.type == "cpu" and not CPU_HAS_INT8:
        return _as_float(x, weight)

    # Pad with rows and columns of zeros, which change nothing and are cut off again.
    rows, outputs = x.shape[0], weight.shape[0]
    inner = -x.shape[1] % MULTIPLE
    x = F.pad(x, (0, inner, 0, max(0, SMALLEST_ROWS - rows)))
    weight = F.pad(weight, (0, inner, 0, -outputs % MULTIPLE))
    return torch._int_mm(x, weight.t())[:rows, :outputs]


def _as_float(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same integers from float32 products, in pieces whose sums float32 represents exactly."""
    pieces = zip(x.split(EXACT_INNER, dim=1), weight.split(EXACT_INNER, dim=1), strict=True)
    sums = [(a.float() @ b.float().t()).to(torch.int32) for a, b in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0, dtype=torch.int32)
