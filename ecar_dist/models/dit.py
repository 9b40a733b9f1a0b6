"""`dit`: a class-conditional diffusion transformer (Peebles and Xie, arXiv 2212.09748) trained by flow matching on
full-resolution latents, as SiT is (Ma et al., arXiv 2401.08740, linear path, velocity prediction)."""

from __future__ import annotations

from ecar_dist.models.presets import Preset
from ecar_dist.models.pyramid import Pyramid


class DiT(Pyramid):
    """The pyramid of one stage: ECAR with K = 1 and no AR transformer, weight for weight.

    Unlike DiT: queries and keys are normalised, no variance is learned, positions are those of models/layers.py, and
    one row of a stage embedding is added to the class and the time.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        latent_size: int,
        latent_channels: int,
        patch_size: int,
        num_classes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            preset,
            stage_sizes=(latent_size,),
            latent_channels=latent_channels,
            patch_size=patch_size,
            num_classes=num_classes,
            recompute=recompute,
        )
