"""Open an autoencoder by the config's `vae` section, or by the short name of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from ecar_dist.errors import ConfigError
from ecar_dist.vae.codec import LatentCodec
from ecar_dist.vae.pretrained import open_pretrained
from ecar_dist.vae.table import CODECS


class VaeSettings(Protocol):
    """The config's `vae` section."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> str | None: ...

    @property
    def downsample(self) -> int: ...


def open_codec(
    settings: VaeSettings, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """Raises ConfigError where the autoencoder is missing, is of another kind, or shrinks by another factor."""
    entry = CODECS[settings.kind]
    if entry.downsamples and settings.downsample not in entry.downsamples:
        raise ConfigError(
            f"vae.kind={settings.kind} has vae.downsample in {list(entry.downsamples)}, got {settings.downsample}; "
            "use one of these"
        )
    codec = entry.open(settings.path, settings.downsample, torch.device(device), dtype)

    # a codec with weights says itself by how much it shrinks
    if codec.identity.downsample != settings.downsample:
        raise ConfigError(
            f"vae.downsample={settings.downsample}, but {codec.identity.name} shrinks by {codec.identity.downsample}; "
            f"set vae.downsample={codec.identity.downsample}"
        )
    return codec


def open_codec_by_spec(
    spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """Open `dct-f8` or another codec without weights, named KIND-fDOWNSAMPLE, or the folder or hub name of one with.

    Raises ConfigError as `open_codec` does.
    """
    device = torch.device(device)
    without_weights = {f"{kind}-f{n}": (entry, n) for kind, entry in CODECS.items() for n in entry.downsamples}
    if spec in without_weights:
        entry, downsample = without_weights[spec]
        return entry.open(None, downsample, device, dtype)

    # a mistyped name would be looked up on the hub otherwise
    mistyped = any(spec.lower().startswith(kind) for kind, entry in CODECS.items() if not entry.needs_path)
    if mistyped and "/" not in spec and not Path(spec).exists():
        known = ", ".join(without_weights)
        raise ConfigError(f"--vae {spec} is not known; give {known}, or folder or hub name of an autoencoder")
    return open_pretrained(spec, device, dtype)
