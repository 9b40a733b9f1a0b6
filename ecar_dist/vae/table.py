"""The values of `vae.kind`. To add one, write a file like dct.py, and add its entry here.

The configuration reads this table, so torch and the autoencoders are imported only when one is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    from ecar_dist.vae.codec import LatentCodec

# (folder or hub name, or None; downsample; device; type of its computation) -> the autoencoder
Open: TypeAlias = "Callable[[str | None, int, torch.device, torch.dtype], LatentCodec]"


@dataclass(frozen=True)
class CodecKind:
    """One kind of autoencoder.

    downsamples: image pixels per latent pixel side that a codec without weights offers. Empty for a codec with weights,
        which is opened from `vae.path` and determines its own factor.
    """

    open: Open
    downsamples: tuple[int, ...] = ()

    @property
    def needs_path(self) -> bool:
        return not self.downsamples


def _open_kl(path: str | None, downsample: int, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    from ecar_dist.vae.pretrained import open_pretrained

    return open_pretrained(path or "", device, dtype, "kl")


def _open_dc(path: str | None, downsample: int, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    from ecar_dist.vae.pretrained import open_pretrained

    return open_pretrained(path or "", device, dtype, "dc")


def _open_dct(path: str | None, downsample: int, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    from ecar_dist.vae.dct import DctCodec

    return DctCodec(downsample, device)


def _open_identity(path: str | None, downsample: int, device: torch.device, dtype: torch.dtype) -> LatentCodec:
    from ecar_dist.vae.identity import IdentityCodec

    return IdentityCodec(device)


CODECS: dict[str, CodecKind] = {
    "kl": CodecKind(_open_kl),
    "dc": CodecKind(_open_dc),
    "dct": CodecKind(_open_dct, downsamples=(8, 32)),
    "identity": CodecKind(_open_identity, downsamples=(1,)),
}
