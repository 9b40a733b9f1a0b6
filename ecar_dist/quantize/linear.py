"""A linear map with integer weights and integer activations."""

from __future__ import annotations

import torch
from torch import nn

from ecar_dist.quantize.integer_product import integer_product
from ecar_dist.quantize.quantizer import pack_int4, quantize_rows, unpack_int4
from ecar_dist.quantize.transform import rotate

ACTIVATION_BITS = 8
PACKED_BITS = 4  # weights of at most this many bits are stored two per byte


class QuantizedLinear(nn.Module):
    """Y = X W^T + b with int8 activations, one scale per token, and weights of 2 to 8 bits, one scale per output.

    The product is computed in integers (`integer_product`). Weights of 4 bits are packed two per byte, in memory too,
    and unpacked for each product: they save memory, not time.

    Buffers:
        weight: int8 [out, in], or uint8 [out, ceil(in / 2)].
        weight_scale: float32 [out].
        input_factor: float32 [in]; what X is multiplied by before the rotation, 1/s times the random sign.
        bias: float32 [out], or None.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_factor: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, weight_bits: int, rotated: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits = weight_bits
        self.rotated = rotated
        packed = weight_bits <= PACKED_BITS
        stored = -(-in_features // 2) if packed else in_features
        self.register_buffer("weight", torch.zeros(out_features, stored, dtype=torch.uint8 if packed else torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("input_factor", torch.ones(in_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @staticmethod
    @torch.no_grad()
    def of(
        linear: nn.Linear,
        weight_bits: int,
        *,
        balance: torch.Tensor | None = None,
        signs: torch.Tensor | None = None,
    ) -> QuantizedLinear:
        """The quantised form of a linear map.

        balance: s [in] of `balance_factors`; None: 1. signs: [in], of the rotation; None: no rotation.
        """
        made = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            weight_bits=weight_bits,
            rotated=signs is not None,
            bias=linear.bias is not None,
        ).to(linear.weight.device)
        factor = torch.ones(linear.in_features, device=linear.weight.device)
        balance = factor if balance is None else balance.to(factor)
        signs = factor if signs is None else signs.to(factor)

        # Both transforms, then one rounding.
        weight = linear.weight.float() * (balance * signs)
        codes, scale = quantize_rows(rotate(weight) if made.rotated else weight, weight_bits)

        made.weight.copy_(pack_int4(codes) if weight_bits <= PACKED_BITS else codes)
        made.weight_scale.copy_(scale[:, 0])
        made.input_factor.copy_(signs / balance)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        return made

    def codes(self) -> torch.Tensor:
        """The weights as int8 [out, in]."""
        return unpack_int4(self.weight, self.in_features) if self.weight_bits <= PACKED_BITS else self.weight

    def transformed(self, x: torch.Tensor) -> torch.Tensor:
        """X diag(1/s) R, float32 [..., in]."""
        x = x.float() * self.input_factor
        return rotate(x) if self.rotated else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the type that a linear map would return here."""
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

        # Float32 up to the rounding, whatever autocast says; then integers.
        with torch.autocast(device, enabled=False):
            codes, scale = quantize_rows(self.transformed(x), ACTIVATION_BITS)
            sums = integer_product(codes.flatten(0, -2), self.codes()).unflatten(0, x.shape[:-1])
            y = sums.float() * scale * self.weight_scale
            return (y if self.bias is None else y + self.bias).to(kind)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}A{ACTIVATION_BITS}"
