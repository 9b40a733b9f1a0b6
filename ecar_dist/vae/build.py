"""Open an autoencoder from the config's `vae` section, or by its short name on the command line."""

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
    """Raises ConfigError if the autoencoder is missing, or has a different kind or downsampling factor."""
    entry = CODECS[settings.kind]
    if entry.downsamples and settings.downsample not in entry.downsamples:
        raise ConfigError(
            f"vae.kind={settings.kind} has vae.downsample in {list(entry.downsamples)}, got {settings.downsample}; "
            "use one of these"
        )
    codec = entry.open(settings.path, settings.downsample, torch.device(device), dtype)

    # a codec with weights determines its own downsampling factor
    if codec.identity.downsample != settings.downsample:
        raise ConfigError(
            f"vae.downsample={settings.downsample}, but {codec.identity.name} has {codec.identity.downsample}; "
            f"set vae.downsample={codec.identity.downsample}"
        )
    return codec


def open_codec_by_spec(
    spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """Open a codec without weights by its name KIND-fDOWNSAMPLE (`dct-f8`), or one with weights by folder or hub name.

    Raises ConfigError as `open_codec` does.
    """
    device = torch.device(device)
    without_weights = {f"{kind}-f{n}": (entry, n) for kind, entry in CODECS.items() for n in entry.downsamples}
    if spec in without_weights:
        entry, downsample = without_weights[spec]
        return entry.open(None, downsample, device, dtype)

    # otherwise a mistyped name would be looked up on the hub
    mistyped = any(spec.lower().startswith(kind) for kind, entry in CODECS.items() if not entry.needs_path)
    if mistyped and "/" not in spec and not Path(spec).exists():
        known = ", ".join(without_weights)
        raise ConfigError(f"--vae {spec} is not known; give {known}, or the folder or hub name of an autoencoder")
    return open_pretrained(spec, device, dtype)
