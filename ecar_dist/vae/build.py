"""Open an autoencoder by the config's `vae` section, or by the short spec of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ecar_dist.config.run import VaeSection
from ecar_dist.errors import ConfigError
from ecar_dist.vae.codec import LatentCodec
from ecar_dist.vae.dct import KEPT_SIDE, DctCodec
from ecar_dist.vae.pretrained import open_pretrained


def _open_pretrained(section: VaeSection, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    return open_pretrained(section.path or "", device, dtype, section.kind)


def _open_dct(section: VaeSection, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    if section.downsample not in KEPT_SIDE:
        raise ConfigError(
            f"vae.kind=dct has vae.downsample in {sorted(KEPT_SIDE)}, got {section.downsample}; use one of these"
        )
    return DctCodec(section.downsample, device)


_OPENERS: dict[str, Callable[[VaeSection, torch.device, torch.dtype], LatentCodec]] = {
    "kl": _open_pretrained,
    "dc": _open_pretrained,
    "dct": _open_dct,
}


def open_codec(
    section: VaeSection, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """Raises ConfigError where the autoencoder is missing, is of another kind, or shrinks by another factor."""
    codec = _OPENERS[section.kind](section, torch.device(device), dtype)
    if codec.identity.downsample != section.downsample:
        raise ConfigError(
            f"vae.downsample={section.downsample}, but {codec.identity.name} shrinks by {codec.identity.downsample}; "
            f"set vae.downsample={codec.identity.downsample}"
        )
    return codec


def open_codec_by_spec(
    spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """`dct-f8`, `dct-f32`, or folder or hub name of a KL or DC autoencoder. Raises ConfigError as `open_codec` does."""
    known = {f"dct-f{downsample}": downsample for downsample in KEPT_SIDE}
    if spec in known:
        return DctCodec(known[spec], torch.device(device))
    if spec.lower().startswith("dct") and "/" not in spec and not Path(spec).exists():
        raise ConfigError(
            f"--vae {spec} is not known; give {', '.join(known)}, or folder or hub name of an autoencoder"
        )
    return open_pretrained(spec, torch.device(device), dtype)
