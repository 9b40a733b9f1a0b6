"""Codebooks stored next to latent shards. `ecar-data fit-codebook` fits one; models over codes start from its codes.

Only the codes are stored. Training itself looks up the nearest code of each token. So the shards, their order and the
data of all other model kinds stay the same, and each sample of the autoencoder's posterior is quantised as drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ecar_dist.data.shards.entries import CodebookEntry
from ecar_dist.data.shards.manifest import Manifest, write_manifest
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import join, read_bytes
from ecar_dist.vae.codec import EncoderIdentity, hash_config

_CODES, _STD = "codes", "residual_std"


class Fitted(NamedTuple):
    """codes: float32 [V, c]. residual_std: of the values of (token - its code), over the set, float32 [1]."""

    codes: torch.Tensor
    residual_std: torch.Tensor


def encoder_hash(encoder: EncoderIdentity) -> str:
    """sha256 of everything that determines the tokens: encoder and normalisation, but not the encoder's name."""
    return hash_config({key: value for key, value in encoder.to_dict().items() if key != "name"})


def write_codebook(folder: Path, manifest: Manifest, fitted: Fitted, patch_size: int) -> CodebookEntry:
    """Write codes next to the shards and list them in the manifest. Replaces a codebook of the same size and patch."""
    size = len(fitted.codes)
    data = save({_CODES: fitted.codes.float().contiguous(), _STD: fitted.residual_std.float()})
    entry = CodebookEntry(
        name=f"codebook-p{patch_size}-v{size}.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        size=size,
        patch_size=patch_size,
        encoder_sha256=encoder_hash(EncoderIdentity.from_dict(manifest.encoder)),
    )

    # Write the file first, so that a manifest never names a codebook that does not exist.
    with atomic_write(folder / entry.name) as file:
        file.write(data)
    others = [one for one in manifest.codebooks if one.name != entry.name]
    listed = sorted([*others, entry], key=lambda one: (one.patch_size, one.size))
    write_manifest(folder, dataclasses.replace(manifest, codebooks=listed))
    return entry


def read_codebook(folder: str | Path, manifest: Manifest, entry: CodebookEntry) -> Fitted:
    """A codebook of a set. Raises DataError if the file is not the one in the manifest, or is for another encoder."""
    url = join(folder, entry.name)
    again = (
        f"fit it again with `ecar-data fit-codebook {redact(folder)} --size {entry.size} --patch-size "
        f"{entry.patch_size}`"
    )
    encoder = EncoderIdentity.from_dict(manifest.encoder)
    if entry.encoder_sha256 != encoder_hash(encoder):
        raise DataError(
            f"{redact(url)} was fitted to latents of a different autoencoder or normalisation than {encoder.name} "
            f"(identity {entry.encoder_sha256[:12]}, not {encoder_hash(encoder)[:12]}); {again}"
        )

    # Check that the bytes are those that were written, and that they contain tensors of the stated shapes.
    data = read_bytes(url, limit=entry.bytes)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise DataError(f"{redact(url)} has sha256 {found}, the manifest says {entry.sha256}; restore it, or {again}")
    shape = (entry.size, encoder.latent_channels * entry.patch_size**2)
    try:
        tensors = load(data)
    except SafetensorError:
        tensors = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {_CODES: shape, _STD: (1,)} or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DataError(f"{redact(url)} does not contain {shape[0]} finite codes of {shape[1]} numbers; {again}")
    return Fitted(tensors[_CODES].float(), tensors[_STD].float())


def codebook_of(places: Sequence[str], manifests: Sequence[Manifest], size: int, patch_size: int) -> Fitted:
    """The codebook of the first of several sets, which the model uses for all of them. Raises as `read_codebook`."""
    (entry,) = (one for one in manifests[0].codebooks if (one.size, one.patch_size) == (size, patch_size))
    return read_codebook(places[0], manifests[0], entry)
