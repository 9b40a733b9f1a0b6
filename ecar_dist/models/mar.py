"""`mar`: masked autoregression over continuous tokens (MAR: Li et al., arXiv 2406.11838) with a flow head.

The method is the paper's: a bidirectional transformer sees the tokens that are not masked, and a small network draws
each masked token from the transformer's output at its place. Three things differ. The head predicts the velocity of a
flow instead of the noise of a diffusion, so that the objective and the solvers are those of the other kinds. One trunk
sees all tokens, with a learned vector for the masked ones, instead of an encoder of the visible tokens and a decoder.
The class modulates the trunk (adaLN, one matrix for all blocks) instead of being 64 tokens at the front.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.attention import full_attention
from ecar_dist.models.layers import (
    AdaLN,
    ClassEmbedding,
    Embedding,
    Linear,
    PositionEmbedding,
    TimeEmbedding,
    ZeroLinear,
    modulated_norm,
    position_table,
)
from ecar_dist.models.transformer import Transformer


class HeadBlock(nn.Module):
    """A residual two-layer network between a modulated norm and a gate, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = AdaLN(width, 3)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Both inputs are [..., D]."""
        # adaLN-Zero: the gate starts at zero, so the block starts as the identity.
        shift, scale, gate = self.modulation(conditioning).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated_norm(x, shift, scale))


class FlowHead(nn.Module):
    """dx/du of single tokens from their states, times and conditions. Exactly zero before training."""

    def __init__(self, width: int, depth: int, token_channels: int) -> None:
        super().__init__()
        self.state_projection = Linear(token_channels, width)
        self.condition_projection = Linear(width, width)
        self.time_embedding = TimeEmbedding(width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.head_modulation = AdaLN(width, 2)
        self.output = ZeroLinear(width, token_channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [..., c], time [...] and condition [..., D], which are broadcast -> float32 [..., c]."""
        # What modulates the blocks: the token's own time, and the trunk's output at its place.
        conditioning = self.time_embedding(time.flatten()).unflatten(0, time.shape) + condition  # [..., D]

        # Residual blocks, token by token: without attention, tokens of one step are independent given the trunk.
        x = self.state_projection(x)  # [..., D]
        for block in self.blocks:
            x = block(x, conditioning)

        # Head norm and velocity.
        shift, scale = self.head_modulation(conditioning).chunk(2, dim=-1)
        return self.output(modulated_norm(x, shift, scale)).float()


class MaskedTransformer(nn.Module):
    """A vector for every place, from the tokens that are not masked and the class."""

    def __init__(self, size: TrunkSize, *, grid_side: int, token_channels: int, num_classes: int, recompute: bool):
        super().__init__()
        self.state_projection = Linear(token_channels, size.width)
        self.mask_vector = Embedding(1, size.width)
        self.class_embedding = ClassEmbedding(num_classes, size.width)
        self.positions = PositionEmbedding([grid_side], size.width)
        self.transformer = Transformer(size.depth, size.width, size.heads, adaln="shared", recompute=recompute)
        self.output_positions = PositionEmbedding([grid_side], size.width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens [B, T, c], mask bool [B, T], labels [B] -> float32 [B, T, D]; masked tokens are ignored."""
        # Masked tokens are replaced by one learned vector.
        places = torch.arange(tokens.shape[1], device=tokens.device)
        unknown = self.mask_vector(torch.zeros_like(places))  # [T, D]
        x = torch.where(mask[..., None], unknown, self.state_projection(tokens))  # [B, T, D]

        # Fixed and learned positions, so that places with the same vector differ.
        x = x + position_table(math.isqrt(tokens.shape[1]), x.shape[-1], x.device) + self.positions(places)

        attends = [full_attention] * len(self.transformer.blocks)
        return self.transformer(x, self.class_embedding(labels)[:, None], attends) + self.output_positions(places)


class MAR(nn.Module):
    """Trunk and head, trained end to end, on the latent's tokens [B, T, c], c = C p^2.

    Arguments:
        size: depths, width and heads.
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
        latent_size: int,
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = latent_channels * patch_size**2

        # The trunk runs once per step on all tokens; the head, at each solver call on the tokens being drawn.
        self.trunk = MaskedTransformer(
            size,
            grid_side=latent_size // patch_size,
            token_channels=channels,
            num_classes=num_classes,
            recompute=recompute,
        )
        self.head = FlowHead(size.width, size.head_depth, channels)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        states: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Velocities [B, R, T, c], float32, of R draws of every token, at the cost of one pass through the trunk.

        Arguments:
            tokens: clean tokens, [B, T, c].
            mask: bool [B, T], True where the trunk sees the mask vector instead. Only the velocities there are valid.
            states: x_u, [B, R, T, c].
            times: model time in [0, 1], float32 [B, R, T].
            labels: int64 [B]; num_classes is the null label.
        """
        # The trunk's output is the same for all R draws: [B, 1, T, D] is broadcast.
        return self.velocity(states, times, self.conditions(tokens, mask, labels)[:, None])

    def conditions(self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The head's condition at every place, [B, T, D]. Computed once per step, not at each solver call."""
        return self.head.condition_projection(self.trunk(tokens, mask, labels))

    def velocity(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """dx/du of tokens x [..., c] at model time [...]; float32. `condition` [..., D] is from `conditions`."""
        return self.head(x, time, condition)
