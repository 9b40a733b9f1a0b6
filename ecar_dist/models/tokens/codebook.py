"""The codebook that turns continuous tokens into discrete ones; part of the model, so it is stored with the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ecar_dist.flow.discrete.nearest_code import nearest_codes

# Names of these parameters in a model.
CODEBOOK = "codebook.codes"
RESIDUAL_SCALE = "residual_scale.scale"


class Codebook(nn.Module):
    """V codes of c numbers. They get no gradient: training leaves them as `ecar-data fit-codebook` fitted them.

    Their values are exact in bfloat16, so that training in bf16 and sampling in fp32 see the same codes.
    """

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, channels).bfloat16().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [..., c] -> the nearest codes, int64 [...]; codes, int64 [...] -> their vectors, float32 [..., c]."""
        codes = self.codes.detach()
        if not x.is_floating_point():
            return F.embedding(x, codes).float()
        # The nearest code is found in float32: bf16 would lose half of the bits of a distance.
        with torch.autocast(x.device.type, enabled=False):
            return nearest_codes(x, codes)


class ResidualScale(nn.Module):
    """The standard deviation of what the codes leave out, one number; fitted, like the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        """Residuals of unit variance -> residuals on the tokens' own scale, or the inverse; float32."""
        scale = self.scale.detach().float()
        return x / scale if inverse else x * scale
