"""`ecar-data verify`, `stats` and `preview`: read a finished set."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.moments_statistics import POINT_SHARPNESS
from data_tools.progress import progress
from data_tools.spectrum.report import print_spectrum
from ecar_dist.data.codebook import read_codebook
from ecar_dist.data.images.decode import ImageDecoder, PilDecoder
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.shards.entries import ShardEntry
from ecar_dist.data.shards.manifest import MANIFEST_NAME, ImageManifest, Manifest, load_manifest, schema_of
from ecar_dist.data.shards.proof import describe_shard
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.data.shards.tar_index import index_tar, write_dali_index
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import naming
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import file_in, is_remote, local_path, meant_url
from ecar_dist.storage.untrusted import UntrustedError, read_plain_file
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec, check_same_encoder, normalise
from ecar_dist.vae.pixels import to_pixels

_SHEET_SIDE = 8
_READ_BATCH = 256
_SHOWN_CLASSES = 100


def verify(folder: Path) -> None:
    """Check sizes, hashes, structure and every sample of latent or image shards. Raises DataError for a fault."""
    _refuse_url(folder)
    count = _verify_images(folder) if schema_of(folder) == ImageManifest.SCHEMA else _verify_latents(folder)
    print(f"{folder}: {count} samples verified")


def stats(folder: Path, *, spectrum: bool = False) -> None:
    """Print the manifest of latent shards; with `spectrum` also their eigenvalues, and the calls that these need."""
    _refuse_url(folder)
    manifest = load_manifest(folder)
    encoder = EncoderIdentity.from_dict(manifest.encoder)
    numbers = manifest.statistics
    failures = manifest.failures

    # The content of the set.
    gigabytes = sum(entry.bytes for entry in manifest.shards) / 1e9
    print(f"samples             {manifest.count} in {len(manifest.shards)} shards, {gigabytes:.3f} GB")
    print(f"classes             {manifest.num_classes}: {_class_list(manifest.class_names)}")
    print(f"moments             {list(manifest.moments_shape)} fp16" + (" and mirrored" if manifest.has_flip else ""))
    print(f"encoder             {encoder.name}")
    print(f"scale, shift        {encoder.scaling_factor:.6g} {encoder.shift_factor:.6g}")

    # Whether the normalisation fits, and how much fp16 and the clamp of the logvars have cut off.
    for name in ("raw_mean", "raw_std", "normalised_mean", "normalised_std"):
        print(f"{name:<20}{_per_channel(numbers.get(name))}")
    print(f"saturated           {_share(numbers.get('saturated_mean_share'))} of means at the limit of fp16, ", end="")
    print(f"{_share(numbers.get('clamped_logvar_share'))} of logvars at their clamp")
    print(f"posterior_sharpness {_sharpness(numbers.get('posterior_sharpness'), encoder.deterministic)}")

    # Codebooks fitted to it.
    for codebook in manifest.codebooks:
        patch = f"{codebook.patch_size} x {codebook.patch_size}"
        print(f"codebook            {codebook.size} codes for tokens of {patch}, {codebook.name}")

    # How it was made.
    made = manifest.preprocessing
    print(f"preprocessing       {made.get('decoder', 'unknown')}, resize {made.get('resize', 'unknown')}")
    print(f"failures            {failures['count']}" + (f", listed in {failures['file']}" if failures["file"] else ""))
    print(f"dataset_id          {manifest.dataset_id}")
    if spectrum:
        print_spectrum(folder, manifest)


def _class_list(names: list[str]) -> str:
    """`0 cat, 1 dog`; the end of a long list is in the manifest."""
    shown = [f"{label} {readable(name)}" for label, name in enumerate(names[:_SHOWN_CLASSES])]
    return ", ".join(shown) + (f", ... (class_names in {MANIFEST_NAME})" if len(names) > _SHOWN_CLASSES else "")


def preview(folder: Path, out: Path, vae: str | None = None) -> None:
    """Decode the first 64 samples into one image. They are a random choice, because shards are shuffled when written.

    Raises DataError for a different autoencoder, ConfigError if `out` has no extension of an image format.
    """
    _refuse_url(folder)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--out {out} does not have the extension of an image format; give e.g. {out.name}.png")
    manifest = load_manifest(folder)
    identity = EncoderIdentity.from_dict(manifest.encoder)
    codec = _open_codec(vae, identity)
    check_same_encoder(identity, codec.identity, str(folder))

    # Posterior means, without sampling noise, back to pixels.
    moments = torch.from_numpy(_first_moments(folder, manifest, _SHEET_SIDE**2))
    shape = (len(moments), identity.latent_channels, *moments.shape[2:])
    decoded = to_pixels(codec.decode(normalise(identity, moments, torch.zeros(shape))))  # [N, S, S, 3]

    # Arrange them in 8 rows of 8. A smaller set leaves black squares at the end.
    pixels = np.zeros((_SHEET_SIDE**2, *decoded.shape[1:]), np.uint8)
    pixels[: len(decoded)] = decoded
    side = _SHEET_SIDE * pixels.shape[1]
    rows = pixels.reshape(_SHEET_SIDE, _SHEET_SIDE, *pixels.shape[1:]).swapaxes(1, 2)  # [row, S, column, S, 3]
    with naming(out):
        Image.fromarray(rows.reshape(side, side, 3)).save(out)
    print(f"{out}: {len(decoded)} decoded samples of {folder}")


def _refuse_url(folder: Path) -> None:
    if url := meant_url(folder):
        raise DataError(f"{redact(url)} is a URL; give a local folder with a copy of the set")


def _open_codec(vae: str | None, identity: EncoderIdentity) -> LatentCodec:
    try:
        return open_codec_by_spec(vae or identity.name)
    except ConfigError as error:
        hint = "" if vae else "; if the autoencoder of these latents has moved, give --vae"
        raise ConfigError(f"{error}{hint}") from None


def _first_moments(folder: Path, manifest: Manifest, number: int) -> np.ndarray:
    """At most `number` samples from the beginning of the set, fp16 [N, *shape]."""
    shards = (open_latent_shard(file_in(folder, entry.name), entry, manifest) for entry in manifest.shards)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < min(number, manifest.count):
        parts.append(next(shards).moments)
    return np.concatenate(parts)[:number]


def _per_channel(values: object) -> str:
    """`values` comes from the manifest, where no schema checks its type."""
    numbers = values if isinstance(values, list) else []
    return " ".join(f"{value:.4f}" for value in numbers if isinstance(value, int | float)) or "unknown"


def _share(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, int | float) else "an unknown share"


def _sharpness(sharpness: object, deterministic: bool) -> str:
    if deterministic:
        return "none, the encoder is deterministic"
    if not isinstance(sharpness, int | float):
        return "unknown"
    if not sharpness < POINT_SHARPNESS:
        return f"{sharpness:.5f}"
    return (
        f"{sharpness:.5f}, below {POINT_SHARPNESS:g}: the posterior is nearly a point, and the logvars (half of the "
        "bytes) carry almost no information"
    )


def _verify_images(folder: Path) -> int:
    with contextlib.closing(ImageShards(folder)) as shards:
        return _verify_records(folder, shards)


def _verify_records(folder: Path, shards: ImageShards) -> int:
    # The complete tars, if they are local. Otherwise only the hash of each image is checked.
    home = shards.manifest.home(folder)
    for entry in shards.manifest.shards:
        if entry.kind == "tar" and not is_remote(home):
            _check_sha256(local_path(home), entry)

    # Every image must be decodable. The error counts the bad ones.
    decoder = PilDecoder()
    bad: list[str] = []
    with progress(len(shards), "image", "verify") as bar:
        for first in range(0, len(shards), _READ_BATCH):
            for record in shards.read_many(range(first, min(first + _READ_BATCH, len(shards)))):
                bad += _fault(decoder, record)
                bar.update()
    if bad:
        raise DataError(f"{folder}: {len(bad)} of {len(shards)} images cannot be used, the first: {bad[0]}")
    return len(shards)


def _fault(decoder: ImageDecoder, record: ImageRecord) -> list[str]:
    try:
        decoder.decode([record.data], [record.where])
    except DataError as error:
        return [str(error)]
    return []


def _verify_latents(folder: Path) -> int:
    manifest = load_manifest(folder)
    expected = EncoderIdentity.from_dict(manifest.encoder)

    # The shards must follow each other without gaps, be those of the manifest, and agree with their own description.
    first_index = 0
    with progress(manifest.count, "sample", "verify") as bar:
        for entry in manifest.shards:
            if entry.first_index != first_index:
                raise DataError(
                    f"{folder}: {entry.name} begins at sample {entry.first_index}, not {first_index}; run "
                    "`ecar-data finalize` again"
                )
            _check_sha256(folder, entry)
            path = file_in(folder, entry.name)
            _check_dali_index(path)
            shard = open_latent_shard(path, entry, manifest)
            stated = shard.description().get("encoder", {})
            check_same_encoder(expected, EncoderIdentity.from_dict(stated), shard.where)
            shard.check_samples()
            first_index += entry.count
            bar.update(entry.count)

    if first_index != manifest.count:
        raise DataError(
            f"{folder}: the shards have {first_index} samples, the manifest says {manifest.count}; run "
            "`ecar-data finalize` again"
        )
    for codebook in manifest.codebooks:
        read_codebook(folder, manifest, codebook)
    return manifest.count


def _check_dali_index(path: Path) -> None:
    """Raises DataError if the DALI index of a tar does not match the tar. The index may be missing."""
    beside = path.with_suffix(".idx")
    with tempfile.TemporaryDirectory() as scratch:
        derived = Path(scratch) / beside.name
        write_dali_index(derived, index_tar(path))
        expected = derived.read_bytes()
        try:
            same = read_plain_file(beside, len(expected)) == expected
        except FileNotFoundError:
            return
        except UntrustedError:
            same = False
        if not same:
            raise DataError(f"{beside} is not the index of its tar; delete or restore it")


def _check_sha256(folder: Path, entry: ShardEntry) -> None:
    path = file_in(folder, entry.name)
    if not path.exists():
        raise DataError(f"{path} is in the manifest but does not exist; restore it or write it again")
    # The size comes first: reading a pipe or a device would never end.
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(f"{path} has {size} bytes, the manifest says {entry.bytes}; restore it or write it again")
    found = describe_shard(path, entry.count, entry.first_index).sha256
    if found != entry.sha256:
        raise DataError(f"{path} has sha256 {found}, the manifest says {entry.sha256}; restore it or write it again")
