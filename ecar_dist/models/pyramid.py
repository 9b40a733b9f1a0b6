"""`pyramid` and `dit`: the multistage flow of ECAR without its AR transformer.

After Pyramid Flow (Jin et al., arXiv 2410.05954): the same windows, jumps and losses, but a stage knows about the
coarser ones only what its own start state contains.

With one stage it is `dit`, a class-conditional diffusion transformer (Peebles and Xie, arXiv 2212.09748) trained by
flow matching as SiT is (Ma et al., arXiv 2401.08740, linear path, velocity prediction). Unlike DiT it normalises
queries and keys, learns no variance, uses the positions of models/layers.py, and adds a stage embedding of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.velocity import VelocityNetwork


class Pyramid(nn.Module):
    """The velocity network alone, conditioned on stage, time and class. The arguments are those of ECAR."""

    def __init__(
        self,
        preset: Preset,
        *,
        stage_sizes: Sequence[int],
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        mean_velocity: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        # ECAR's velocity network, weight for weight, without the projection of token maps.
        self.flow = VelocityNetwork(
            preset,
            grid_sides=[size // patch_size for size in stage_sizes],
            token_channels=latent_channels * patch_size**2,
            patch_size=patch_size,
            num_classes=num_classes,
            condition_width=None,
            mean_velocity=mean_velocity,
            recompute=recompute,
        )

    def forward(
        self,
        contexts: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        labels: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Velocities of all stages; float32, K of [B, C, h_k, w_k]. `contexts` are ignored."""
        return self.all_velocities(states, times, None, labels)

    def conditions(self, contexts: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
        """None: this model has no conditions."""

    def all_velocities(
        self,
        states: Sequence[torch.Tensor],
        times: Sequence[torch.Tensor],
        condition: None,
        labels: torch.Tensor,
        lengths: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """See `MeanVelocityModel`."""
        return self.flow.all_stages(states, times, condition, labels, lengths)

    def start_cache(self) -> None:
        """None: there is nothing to keep between stages."""

    def begin_stage(self, stage: int, context: torch.Tensor | None, labels: torch.Tensor, cache: None) -> None:
        """None: this model has no condition."""

    def velocity(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        stage: int,
        condition: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MeanVelocityModel`."""
        return self.flow(x, time, stage, condition, labels, lengths, modulations)

    def modulations(self, times: torch.Tensor, stage: int, labels: torch.Tensor) -> torch.Tensor:
        """See `StagedModel`."""
        return self.flow.modulations(times, stage, labels)
