"""Drawing from a categorical distribution with given random numbers, by the Gumbel-max trick."""

from __future__ import annotations

import torch


def draw_codes(logits: torch.Tensor, u: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """Draw codes int64 [...] from softmax(logits / temperature), given logits [..., V] and U(0, 1) numbers [..., V].

    argmax_v (l_v / temperature - log(-log u_v)) has that distribution (Gumbel, 1954). With the same numbers, a small
    change of the logits rarely changes the code; the Jacobi sampler relies on this. top_k > 0 keeps the k largest
    logits. Temperature 0 gives the code with the largest logit.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    if 0 < top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return (logits / temperature - torch.log(-torch.log(u))).argmax(dim=-1)
