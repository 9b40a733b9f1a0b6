"""The folder that `ecar-data prepare` makes: images/, latents/, heldout_latents/, and vae/ if one was trained.

Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ecar_dist.data.shards.manifest import MANIFEST_NAME, ImageManifest, Manifest, load_manifest, schema_of
from ecar_dist.errors import DataError
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, UntrustedError, parse_object, read_plain_file
from ecar_dist.vae.table import CODECS

RECORD_NAME = "prepare.json"  # the arguments of prepare, written when it starts
IMAGES, VAE, LATENTS = "images", "vae", "latents"
HELDOUT_LATENTS = "heldout_latents"
TRAIN, HELDOUT = "train", "heldout"
BUILT_IN = (
    "digits",
    "emoji",
    "emoji-plain",
    "photos",
)  # sources of images that are given by name instead of by path
PLAN_NAME = "plan.json"  # in LATENTS: names the image shards that were encoded


@dataclass(frozen=True)
class PreparedLatents:
    """Latent shards, their autoencoder, and the sets that a run is scored against."""

    folder: str  # or URL
    manifest: Manifest
    vae: str  # folder or hub name
    train_images: str | None = None
    heldout_images: str | None = None
    heldout_latents: str | None = None  # for the validation loss


def find_latents(given: str) -> PreparedLatents:
    """The latents of a folder that `prepare` has made, or of a folder or URL of latent shards.

    Raises DataError, with the command to run, if there are none.
    """
    folder = _folder_of(given)
    manifest = load_manifest(folder)
    encoder = manifest.encoder
    if encoder.get("kind") not in CODECS or not {"name", "latent_channels", "downsample"} <= encoder.keys():
        raise DataError(f"{redact(folder)} does not say which autoencoder made it; encode it again")

    # What is next to the latents. The folder may have been moved since they were encoded.
    name = str(encoder["name"])
    if is_remote(folder):
        return PreparedLatents(folder, manifest, name)
    beside = Path(folder).parent
    if not Path(name).exists() and (beside / VAE / "config.json").exists():
        name = str(beside / VAE)
    train_images, heldout_images = _split_images(Path(folder))
    heldout = beside / HELDOUT_LATENTS
    heldout_latents = str(heldout) if (heldout / MANIFEST_NAME).exists() else None
    return PreparedLatents(folder, manifest, name, train_images, heldout_images, heldout_latents)


def _folder_of(given: str) -> str:
    """The folder of the latents. Raises DataError if `given` contains something else."""
    if is_remote(given):
        return given
    root = Path(given)
    if (root / MANIFEST_NAME).exists():
        if schema_of(root) == ImageManifest.SCHEMA:
            raise DataError(
                f"{given} contains images, not latents; encode them with `ecar-data encode {given} OUT --vae ...`"
            )
        return given
    if (root / LATENTS / MANIFEST_NAME).exists():
        return str(root / LATENTS)
    if (root / RECORD_NAME).exists() or (root / PLAN_NAME).exists():
        raise DataError(f"{given} is not finished; repeat the `ecar-data` command that makes it, then run this again")
    if not root.exists():
        raise DataError(f"{given} does not exist; make it with `ecar-data prepare PICTURES {given}`")
    raise DataError(f"{given} has no latents; make them with `ecar-data prepare {given} OUT`, then give OUT")


def _split_images(latents: Path) -> tuple[str | None, str | None]:
    """The training and held-out image shards: next to the latents, or where the plan says; None if one is missing."""
    homes = [latents.parent / IMAGES]
    try:
        source = Path(str(parse_object(read_plain_file(latents / PLAN_NAME, MAX_JSON_BYTES)).get("source_folder")))
        homes.append(source.parent)
    except (OSError, UntrustedError):
        pass
    for home in homes:
        if all((home / part / MANIFEST_NAME).exists() for part in (TRAIN, HELDOUT)):
            return str(home / TRAIN), str(home / HELDOUT)
    return None, None
