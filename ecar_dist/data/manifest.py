"""The two manifests: `ecar-latents-v1` (what training reads) and `ecar-images-v1` (what encoding reads).

A manifest is the only proof of what belongs to a set: a tar that ends early, or a shard that is not there, looks like a
smaller set to every tar reader.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import write_json
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, meant_url, read_bytes
from ecar_dist.storage.retries import ObjectMissing

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30  # of a million shards it has about 300 MB


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it must be found: file name, size in bytes, samples, the first one's global row, hashes."""

    name: str
    bytes: int
    count: int
    first_index: int
    xxh3_128: str
    sha256: str


@dataclass(frozen=True)
class LatentEntry(ShardEntry):
    """A latent shard. Its keys are rows of the encode plan from `first_row` on.

    An image that could not be encoded leaves a gap, so the row of a sample never depends on the fate of another.
    """

    first_row: int
    missing: tuple[int, ...] = ()  # rows left out, rising

    @property
    def rows(self) -> np.ndarray:
        """The plan's row of each sample of the shard, int64 [count]."""
        reserved = np.arange(self.first_row, self.first_row + self.count + len(self.missing), dtype=np.int64)
        return np.setdiff1d(reserved, np.array(self.missing, dtype=np.int64), assume_unique=True)


@dataclass(frozen=True)
class ImageEntry(ShardEntry):
    """One tar, or one class directory, of encoded images, with the table that says where each image lies.

    Of a directory (`kind` "files") `bytes` is the sum of its images' sizes, and the hashes are empty: nobody read them.
    """

    table: str  # file name beside the manifest
    table_xxh3_128: str
    kind: Literal["tar", "files"]


@dataclass(frozen=True)
class ImageManifest:
    """Labelled encoded images: WebDataset tars, or files in a directory per class."""

    SCHEMA: ClassVar[str] = "ecar-images-v1"
    MADE_BY: ClassVar[str] = "ecar-data shard|index SOURCE OUT"

    source: str
    count: int
    num_classes: int
    class_names: list[str]
    shards: list[ImageEntry]
    location: str | None = None  # folder or URL of the tars or directories; None: beside the manifest

    @property
    def dataset_id(self) -> str:
        """Covers the images and their order; where they lie may change, and be corrected in the file."""
        return _dataset_id(dataclasses.replace(self, source="", location=None))

    @property
    def in_tars(self) -> bool:
        """Whether the images come in whole shards, which a `ShardStore` can bring; else each is a file of its own."""
        return all(entry.kind == "tar" for entry in self.shards)

    def home(self, folder: str | Path) -> str | Path:
        """Where the tars or class directories are, for a manifest found in `folder`."""
        return folder if self.location is None else self.location


@dataclass(frozen=True)
class Manifest:
    """Latent shards: raw moments, labels, and everything needed to interpret them."""

    SCHEMA: ClassVar[str] = "ecar-latents-v1"
    MADE_BY: ClassVar[str] = "ecar-data finalize FOLDER"

    count: int
    num_classes: int
    class_names: list[str]
    moments_shape: tuple[int, ...]  # (2C, H, W): mean, logvar; or (C, H, W) of a deterministic encoder
    has_flip: bool  # every sample also stores the moments of its mirrored image
    encoder: dict[str, Any]  # vae.codec.EncoderIdentity.to_dict()
    preprocessing: dict[str, Any]
    statistics: dict[str, Any]
    shards: list[LatentEntry]
    failures: dict[str, Any] = field(default_factory=lambda: {"count": 0, "file": None})

    @property
    def dataset_id(self) -> str:
        return _dataset_id(self)


AnyManifest = TypeVar("AnyManifest", Manifest, ImageManifest)


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of latent shards from a folder or fsspec URL. Raises DataError as `_load` does."""
    return _load(folder, Manifest)


def load_image_manifest(folder: str | Path) -> ImageManifest:
    """Read the manifest of image shards from a folder or fsspec URL. Raises DataError as `_load` does."""
    return _load(folder, ImageManifest)


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    write_json(folder / MANIFEST_NAME, _to_dict(manifest))


def _load(folder: str | Path, kind: type[AnyManifest]) -> AnyManifest:
    """Raises DataError: no manifest, not JSON, another schema, a missing field, or edited after it was written."""
    url = join(folder, MANIFEST_NAME)
    try:
        return _proven(_read_json(url, kind), kind, redact(url))
    except RecursionError:  # the parser's, or that of the hash: no manifest of ours comes near it
        raise DataError(f"{redact(url)} is nested too deep; run `{kind.MADE_BY}` again") from None


def _proven(tree: Any, kind: type[AnyManifest], where: str) -> AnyManifest:
    if not isinstance(tree, dict) or tree.get("schema") != kind.SCHEMA:
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise DataError(f"{where} has schema {found}, expected {kind.SCHEMA}; give the folder made by `{kind.MADE_BY}`")
    stated = tree.pop("dataset_id", None)
    del tree["schema"]
    try:
        manifest = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {place}: {first['msg'].lower()}; run `{kind.MADE_BY}` again") from None
    if manifest.dataset_id != stated:
        raise DataError(
            f"{where} was changed: dataset_id is {stated}, its content gives {manifest.dataset_id}; restore it"
        )
    return manifest


def _read_json(url: str, kind: type[AnyManifest]) -> Any:
    try:
        return json.loads(read_bytes(url, limit=MAX_MANIFEST_BYTES))
    except ObjectMissing as error:
        if is_remote(url):
            raise DataError(f"{error}, or send the set there with `ecar-data push`") from None
        fix = f"did you mean {meant}?" if (meant := meant_url(url)) else f"make it with `{kind.MADE_BY}`"
        raise DataError(f"{redact(url)} does not exist; {fix}") from None
    except ValueError as error:
        raise DataError(f"{redact(url)} is not JSON ({error}); run `{kind.MADE_BY}` again") from None


def _content(manifest: Manifest | ImageManifest) -> dict[str, Any]:
    return {"schema": manifest.SCHEMA, **dataclasses.asdict(manifest)}


def _dataset_id(manifest: Manifest | ImageManifest) -> str:
    """sha256 of the canonical JSON of everything but itself."""
    return hashlib.sha256(json.dumps(_content(manifest), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _to_dict(manifest: Manifest | ImageManifest) -> dict[str, Any]:
    return {**_content(manifest), "dataset_id": manifest.dataset_id}
