"""Vector quantisation: which code of a codebook is nearest to a token."""

from __future__ import annotations

import torch

_ROWS = 4096  # tokens compared with all codes at once: 256 MiB of scores at 16,384 codes


@torch.no_grad()
def nearest_codes(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """argmin_v |z - c_v|^2 for tokens z [..., c] and codes [V, c], in float32; int64 [...]. Ties go to the lower v.

    |z - c|^2 = |z|^2 - 2 (z . c - |c|^2 / 2): the first term is the same for all codes, which leaves one product.
    """
    codes = codes.float()
    offsets = -0.5 * codes.square().sum(-1)  # [V]
    rows = tokens.float().flatten(0, -2)  # [N, c]
    found = [torch.addmm(offsets, part, codes.T).argmax(dim=-1) for part in rows.split(_ROWS)]
    return torch.cat(found).view(tokens.shape[:-1])
