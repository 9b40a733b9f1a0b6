"""Two changes of basis that leave a linear map unchanged and make it easier to quantise (ViDiT-Q, section 4).

    Y = X W^T = ((X diag(1/s)) R) ((W diag(s)) R)^T

- s moves the range of channels that are large in every token into the weights (SmoothQuant: Xiao et al., arXiv
  2211.10438): s_j = max|X_j|^a / max|W_j|^(1 - a).
- R spreads what is left over all channels: random signs, then a Hadamard matrix (QuaRot: Ashkboos et al., arXiv
  2404.00456). Widths are rarely powers of two, so R is block diagonal, with blocks of the largest power of two that
  divides the width.

A weight is quantised once, after both. The signs are part of the vector that X is multiplied by.
"""

from __future__ import annotations

import functools
import math

import torch

from ecar_dist.compiled_constants import constant_when_compiled

_LARGEST = 256  # side of the larger factor of a block: blocks of up to 65,536 channels
_RANGE = 1e4  # of the factors within one layer: a channel that is never used must not decide the scale of the others


def balance_factors(activation_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [n] from max|X_j| and max|W_j| of each input channel, both [n]; geometric mean 1.

    alpha: 0 moves nothing of the activations' range, 1 all of it. Channels that are zero throughout get a factor of 1.
    """
    used = (activation_max > 0) & (weight_max > 0)
    ratio = activation_max.float().pow(alpha) / weight_max.float().pow(1.0 - alpha)
    logarithms = torch.where(used, ratio, torch.ones_like(ratio)).log()

    # A common factor cancels, since every row has a scale of its own.
    if used.any():
        logarithms = torch.where(used, logarithms - logarithms[used].mean(), torch.zeros_like(logarithms))
    return logarithms.clamp(-math.log(_RANGE), math.log(_RANGE)).exp()


def random_signs(width: int, seed: int) -> torch.Tensor:
    """+1 or -1 for each channel, float32 [width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator).float() * 2.0 - 1.0


def block_width(width: int) -> int:
    """The largest power of two that divides the width: 768 -> 256, 1152 -> 128."""
    return width & -width


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix of a power of two, over its square root: orthogonal and symmetric, float32 [size, size]."""
    return _sylvester(size) / math.sqrt(size)


def _sylvester(size: int) -> torch.Tensor:
    """Of +1 and -1; its corners are those of smaller powers of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Every block of channels times the Hadamard matrix: float32 [..., n] -> [..., n]. It is its own inverse.

    H of size a b is the Kronecker product of those of a and b, so a block is an a x b table that takes two products
    with small matrices, (a + b) multiply-adds per channel instead of a b.
    """
    block = block_width(x.shape[-1])
    rows = 1 << (block.bit_length() // 2)
    left, right = _hadamard_on(rows, x.device), _hadamard_on(block // rows, x.device)
    table = x.unflatten(-1, (-1, rows, block // rows))  # [..., n / block, a, b]
    return (left @ table @ right).flatten(-3)


def _hadamard_on(size: int, device: torch.device) -> torch.Tensor:
    """`hadamard(size)`: a corner of the largest one, because a compiled graph keeps one result of each function."""
    return _signs_on(device)[:size, :size] / math.sqrt(size)


@constant_when_compiled
def _signs_on(device: torch.device) -> torch.Tensor:
    return _cached_signs(device)


@functools.lru_cache(maxsize=64)
def _cached_signs(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return _sylvester(_LARGEST).to(device)


def incoherence(channel_max: torch.Tensor) -> float:
    """Largest of the channels' maxima [n] divided by their mean: 1 if all are equal."""
    return float(channel_max.max() / channel_max.mean().clamp_min(1e-30))
