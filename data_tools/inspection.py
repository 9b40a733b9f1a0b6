"""`ecar-data verify | stats | preview`: read a finished set and say what it is."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.progress import progress
from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.images import PilDecoder
from ecar_dist.data.loader import LatentLoader
from ecar_dist.data.manifest import MANIFEST_NAME, ImageManifest, Manifest, ShardEntry, load_manifest
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.data.shards import LatentShard
from ecar_dist.errors import DataError
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, check_same_encoder, normalise
from ecar_dist.vae.pixels import to_pixels

_SHEET_SIDE = 8


def verify(folder: Path) -> None:
    """Sizes, both hashes, structure, CRCs and decodability of every sample of latent or image shards."""
    text = (folder / MANIFEST_NAME).read_text() if (folder / MANIFEST_NAME).exists() else ""
    count = _verify_images(folder) if ImageManifest.SCHEMA in text else _verify_latents(folder)
    print(f"{folder}: {count} samples verified")


def stats(folder: Path) -> None:
    """Print what the manifest says."""
    manifest = load_manifest(folder)
    encoder, numbers = manifest.encoder, manifest.statistics
    print(f"samples             {manifest.count} in {len(manifest.shards)} shards, {_gigabytes(manifest):.3f} GB")
    print(f"classes             {manifest.num_classes}")
    print(f"moments             {list(manifest.moments_shape)} fp16" + (" and mirrored" if manifest.has_flip else ""))
    print(f"encoder             {encoder['name']}")
    print(f"scale, shift        {encoder['scaling_factor']:.6g} {encoder['shift_factor']:.6g}")
    for name in ("raw_mean", "raw_std", "normalised_mean", "normalised_std"):
        print(f"{name:<20}" + " ".join(f"{value:.4f}" for value in numbers[name]))
    print(f"posterior_sharpness {numbers['posterior_sharpness']:.5f}")
    print(f"dataset_id          {manifest.dataset_id}")


def preview(folder: Path, out: Path, vae: str | None = None) -> None:
    """Decode the first 64 samples of the training order into one sheet. Raises DataError for another autoencoder."""
    manifest = load_manifest(folder)
    identity = EncoderIdentity.from_dict(manifest.encoder)
    codec = open_codec_by_spec(vae or identity.name)
    check_same_encoder(identity, codec.identity, str(folder))
    number = _SHEET_SIDE**2
    with LatentLoader(folder, seed=0, global_batch_size=number, micro_batch_size=number) as loader:
        moments = next(loader).moments
    shape = (number, identity.latent_channels, *moments.shape[2:])
    pixels = to_pixels(codec.decode(normalise(identity, moments, torch.zeros(shape))))  # [64, S, S, 3]
    side = _SHEET_SIDE * pixels.shape[1]
    rows = pixels.reshape(_SHEET_SIDE, _SHEET_SIDE, *pixels.shape[1:]).swapaxes(1, 2)  # [row, S, column, S, 3]
    Image.fromarray(rows.reshape(side, side, 3)).save(out)
    print(f"{out}: {number} decoded samples of {folder}")


def _gigabytes(manifest: Manifest) -> float:
    return sum(entry.bytes for entry in manifest.shards) / 1e9


def _verify_images(folder: Path) -> int:
    shards, decoder = ImageShards(folder), PilDecoder()
    for entry in shards.manifest.shards:
        _check_sha256(folder, entry)
    with progress(len(shards), "image", "verify") as bar:
        for index in range(len(shards)):
            record = shards.read(index)
            decoder.decode([record.data], [record.where])
            bar.update()
    return len(shards)


def _verify_latents(folder: Path) -> int:
    manifest = load_manifest(folder)
    with progress(manifest.count, "sample", "verify") as bar:
        for entry in manifest.shards:
            _check_sha256(folder, entry)
            _verify_shard(LatentShard(folder / entry.name, entry, manifest), manifest)
            bar.update(entry.count)
    if sum(entry.count for entry in manifest.shards) != manifest.count:
        raise DataError(f"{folder}: shards do not add up to {manifest.count} samples; run `ecar-data finalize` again")
    return manifest.count


def _verify_shard(shard: LatentShard, manifest: Manifest) -> None:
    described = shard.description()
    expected, found = EncoderIdentity.from_dict(manifest.encoder), EncoderIdentity.from_dict(described["encoder"])
    check_same_encoder(expected, found, str(shard.path))
    sums = np.frombuffer(base64.b64decode(described["crc32"]), dtype="<u4")
    for row in range(shard.entry.count):
        if zlib.crc32(shard.sample_bytes(row)) != sums[row]:
            raise DataError(
                f"{shard.path}: CRC-32 of row {row} is wrong; write the shard again with `ecar-data encode`"
            )
    arrays = [shard.moments] if shard.flipped is None else [shard.moments, shard.flipped]
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError(f"{shard.path}: moments are not finite; check the autoencoder and encode again")


def _check_sha256(folder: Path, entry: ShardEntry) -> None:
    path = folder / entry.name
    found = describe_shard(path, entry.count, entry.first_index) if path.exists() else None
    if found is None or found.sha256 != entry.sha256 or found.bytes != entry.bytes:
        raise DataError(f"{path} is missing or differs from the manifest in size or hash; restore it or write it again")
