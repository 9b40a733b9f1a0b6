"""`hybrid`: masked prediction of codes, then a flow for what the codes leave out, after DC-AR.

A token is its nearest code plus a residual, as in DC-AR (Wu et al., arXiv 2507.04947). A bidirectional transformer
predicts the codes of masked tokens; after the last step a small flow head draws the residuals of all tokens at once.
Four things differ from the paper: the class, not a text, modulates the transformer; the codebook is fitted to the
latents, and neither is normalised to unit length; the head predicts a velocity, so that the objective and the solvers
are those of the other kinds; and the head receives the token's own code in addition to the transformer's output.
"""

from __future__ import annotations

import torch
from torch import nn

from ecar_dist.flow.masking import token_points
from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.layers import Linear, ZeroLinear
from ecar_dist.models.mar import FlowHead, MaskedTransformer
from ecar_dist.models.tokens.codebook import Codebook, ResidualScale


class Hybrid(nn.Module):
    """Logits of codes and velocities of residuals, for tokens [B, T, c] row by row, c = C p^2.

    Arguments:
        size: depths, width and heads.
        num_codes: V.
        latent_size: latent side; T = (latent_size / p)^2.
        latent_channels: C.
        patch_size: p.
        num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
        recompute: the backward pass recomputes each block of the trunk instead of keeping its activations.
    """

    def __init__(
        self,
        size: TrunkSize,
        *,
        num_codes: int,
        latent_size: int,
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = latent_channels * patch_size**2

        # Tokens: a code of the codebook, and a residual of unit variance.
        self.codebook = Codebook(num_codes, channels)
        self.residual_scale = ResidualScale()

        # Once per step: the codes of the masked tokens.
        self.trunk = MaskedTransformer(
            size,
            grid_side=latent_size // patch_size,
            token_channels=channels,
            num_classes=num_classes,
            recompute=recompute,
        )
        self.output = ZeroLinear(size.width, num_codes)

        # At each solver call after the last step: the residuals of all tokens.
        self.code_projection = Linear(channels, size.width)
        self.head = FlowHead(size.width, size.head_depth, channels)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        noise: torch.Tensor,
        u: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Training: (logits float32 [B, T, V], codes int64 [B, T], velocities and targets float32 [B, R, T, c]).

        Arguments:
            tokens: [B, T, c].
            mask: bool [B, T], True where the trunk sees the mask vector instead of the code.
            noise: R draws, [B, R, T, c].
            u: their times on the path, float32 [B, R, T]; `times` are the corresponding model times.
            labels: int64 [B]; num_classes is the null label.
        """
        codes, vectors, residuals = self.split(tokens)
        hidden = self.trunk(vectors, mask, labels)  # [B, T, D]
        states, targets = token_points(residuals, noise, u)
        velocities = self.velocity(states, times, self.conditions(hidden, vectors)[:, None])
        return self.output(hidden).float(), codes, velocities, targets

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes int64 [B, T], their vectors and the residuals of unit variance, float32 [B, T, c]."""
        codes = self.codebook(tokens)
        vectors = self.codebook(codes)
        return codes, vectors, self.residual_scale(tokens - vectors, inverse=True)

    def join(self, vectors: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`: tokens float32 [B, T, c]."""
        return vectors + self.residual_scale(residuals)

    def hidden(self, codes: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sampling: the trunk's output, float32 [B, T, D]; codes int64 [B, T] are ignored where masked."""
        return self.trunk(self.codebook(codes), mask, labels)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, V]."""
        return self.output(hidden).float()

    def conditions(self, hidden: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The head's condition at every place, [B, T, D]: the trunk's output, and the token's own code."""
        return self.head.condition_projection(hidden) + self.code_projection(vectors)

    def velocity(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """dx/du of residuals x [..., c] at model time [...]; float32. `condition` [..., D] is from `conditions`."""
        return self.head(x, time, condition)
