"""A weight-free codec: the low frequencies of an orthonormal block DCT.

It is not a learned autoencoder: it keeps k x k of f x f cosine coefficients of every colour channel and drops the rest,
so its reconstructions are blurred. It needs neither download nor training, and its latents are a linear map of the
image. Use it for tests, dry runs and throughput measurements.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from ecar_dist.vae.codec import EncoderIdentity, denormalise, hash_config, hash_state_dict

KEPT_SIDE = {8: 2, 32: 3}  # block side f -> k; channels are 3 k^2: 12 and 27


class DctCodec:
    """Block DCT-II with orthonormal rows; channel order is (colour, vertical frequency, horizontal frequency)."""

    def __init__(self, downsample: int, device: torch.device) -> None:
        self._block = downsample

        # One f x f filter for each kept pair of frequencies, the same for the three colours.
        kept = KEPT_SIDE[downsample]
        rows = _dct_rows(downsample, kept)  # [k, f]
        basis = torch.einsum("ai,bj->abij", rows, rows).reshape(kept * kept, 1, downsample, downsample)
        self._filters = basis.repeat(3, 1, 1, 1).to(device, torch.float32)  # [3 k^2, 1, f, f]
        self.identity = EncoderIdentity(
            kind="dct",
            name=f"dct-f{downsample}",
            weights_sha256=hash_state_dict({}),
            config_sha256=hash_config({"kind": "dct", "block": downsample, "kept": kept}),
            latent_channels=3 * kept * kept,
            downsample=downsample,
            # The DC coefficient is f x the mean of the block, and such means have a std near 1/2 in photographs.
            scaling_factor=2.0 / downsample,
            shift_factor=0.0,
            deterministic=True,
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 3 k^2, H/f, W/f]."""
        return functional.conv2d(images.float(), self._filters, stride=self._block, groups=3)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 3 k^2, h, w] -> [B, 3, h f, w f]; the transpose of `encode`, its inverse on the kept frequencies."""
        raw = denormalise(self.identity, latents)
        return functional.conv_transpose2d(raw, self._filters, stride=self._block, groups=3).clamp(-1.0, 1.0)


def _dct_rows(block: int, kept: int) -> torch.Tensor:
    """The first `kept` rows of the orthonormal DCT-II matrix of size `block`: float64 [kept, block]."""
    frequency = torch.arange(kept, dtype=torch.float64)[:, None]
    position = torch.arange(block, dtype=torch.float64)[None, :] + 0.5
    rows = torch.cos(math.pi / block * frequency * position) * math.sqrt(2.0 / block)
    # The constant row needs a different factor to have unit norm.
    rows[0] *= math.sqrt(0.5)
    return rows
