"""Symmetric integer quantisation of the rows of a matrix, four-bit values packed in pairs, and the quantisation error.

A row is what one scale belongs to: the weights of one output channel, or the activations of one token (ViDiT-Q: Zhao et
al., arXiv 2406.02540, section 3.1).
"""

from __future__ import annotations

import math

import torch

_TINY = 1e-30  # a row of zeros has this scale instead of 0


def largest_code(bits: int) -> int:
    """The codes of `bits` bits are -m .. m, m = 2^(bits - 1) - 1: symmetric, so there is no zero point."""
    return 2 ** (bits - 1) - 1


def quantize_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [..., n] and scales float32 [..., 1] with x ~ codes * scales, of at most 8 bits.

    s = max|x| / (2^(bits - 1) - 1) of each row, computed from x itself.
    """
    x = x.float()
    largest = largest_code(bits)
    scale = (x.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(_TINY)
    return (x / scale).round().clamp(-largest, largest).to(torch.int8), scale


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 [..., n] in -8 .. 7 -> uint8 [..., ceil(n / 2)]: the even places are the low halves of the bytes."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = (codes & 0xF).view(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `pack_int4`: int8 [..., width]."""
    # A shift to the left and back repeats the sign bit of the low half.
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :width]


def noise_ratio(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Power of the error over the power of the reference: sum (a - b)^2 / sum a^2."""
    reference, approximation = reference.double(), approximation.double()
    return float((reference - approximation).square().sum() / reference.square().sum().clamp_min(_TINY))


def sqnr(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantisation noise ratio in dB, -10 log10 of `noise_ratio`; infinite if nothing differs."""
    ratio = noise_ratio(reference, approximation)
    return -10.0 * math.log10(ratio) if ratio > 0.0 else math.inf
