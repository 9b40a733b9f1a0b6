"""Training time on a named device, from its peak and an assumed utilisation (MFU)."""

from __future__ import annotations

from ecar_dist.errors import ConfigError
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.runtime.devices import PEAK_BF16_FLOPS, peak_bf16_flops

ASSUMED_MFU = 0.40


def training_seconds(macs_per_image: int, num_images: int, world_size: int, device: str) -> float:
    """Wall time on `world_size` devices at ASSUMED_MFU. Raises ConfigError for a device without a known peak."""
    peak = peak_bf16_flops(device)
    if peak is None:
        known = ", ".join(PEAK_BF16_FLOPS)
        raise ConfigError(f"device {device!r} has no known peak; use one of {known}, or leave --device out")
    return macs_per_image * FLOPS_PER_MAC * num_images / (peak * ASSUMED_MFU * world_size)
