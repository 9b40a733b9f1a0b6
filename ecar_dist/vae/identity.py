"""Pixels as latents: the codec that changes nothing.

The model learns the images themselves, three channels at full size. Nothing is lost: a byte comes back as the same
byte, even after the fp16 of latent shards. Use it for small pictures (`--image-size 32`, `model.patch_size: 4`), and to
compare models without the limits of an autoencoder.
"""

from __future__ import annotations

import torch

from ecar_dist.vae.codec import EncoderIdentity, denormalise, hash_config, hash_state_dict


class IdentityCodec:
    """Moments are the images in [-1, 1]; latents are twice that, since pixels of pictures have a std near 1/2."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.identity = EncoderIdentity(
            kind="identity",
            name="identity-f1",
            weights_sha256=hash_state_dict({}),
            config_sha256=hash_config({"kind": "identity"}),
            latent_channels=3,
            downsample=1,
            scaling_factor=2.0,
            shift_factor=0.0,
            deterministic=True,
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] -> the same, float32."""
        return images.to(self._device, torch.float32)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, 3, H, W] -> images [B, 3, H, W] clamped to [-1, 1]."""
        return denormalise(self.identity, latents).clamp(-1.0, 1.0)
