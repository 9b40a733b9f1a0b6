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
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ecar_dist.data.shards.manifest_rules import (
    Bytes,
    Classes,
    Count,
    FailureCount,
    Flag,
    MomentsShape,
    PlainName,
    RelativeName,
    Samples,
    Sha256,
    Tree,
    Visible,
    Xxh3,
    check_channels,
    check_entries,
    check_rows,
    check_tar,
)
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import write_json
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, meant_url, read_bytes
from ecar_dist.storage.retries import ObjectMissing
from ecar_dist.storage.untrusted import (
    UntrustedError,
    first_violation,
    parse_json,
    printable,
)

MANIFEST_NAME = "manifest.json"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
MAX_MANIFEST_BYTES = 1 << 30  # of a million shards it has about 300 MB


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it must be found: file name, size in bytes, samples, the first one's global row, hashes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: RelativeName
    bytes: Bytes
    count: Samples
    first_index: Count
    xxh3_128: Xxh3
    sha256: Sha256


@dataclass(frozen=True)
class LatentEntry(ShardEntry):
    """A latent shard. Its keys are rows of the encode plan from `first_row` on.

    An image that could not be encoded leaves a gap, so the row of a sample never depends on the fate of another.
    """

    first_row: Count
    missing: tuple[Count, ...] = ()  # rows left out, rising

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

    table: PlainName  # file name beside the manifest
    table_xxh3_128: Xxh3
    kind: Literal["tar", "files"]


@dataclass(frozen=True)
class ImageManifest:
    """Labelled encoded images: WebDataset tars, or files in a directory per class."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    SCHEMA: ClassVar[str] = "ecar-images-v1"
    MADE_BY: ClassVar[str] = "ecar-data shard|index SOURCE OUT"

    source: Visible
    count: Samples
    num_classes: Classes
    class_names: list[Visible]
    shards: list[ImageEntry]
    location: Visible | None = None  # folder or URL of the tars or directories; None: beside the manifest

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

    def check_sums(self) -> None:
        """What no field can say alone. Raises UntrustedError."""
        check_entries(self.shards, self.count, self.num_classes, self.class_names)
        for entry in self.shards:
            if entry.kind == "tar":
                check_tar(entry, (entry.xxh3_128, entry.sha256, entry.table_xxh3_128))


@dataclass(frozen=True)
class Manifest:
    """Latent shards: raw moments, labels, and everything needed to interpret them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    SCHEMA: ClassVar[str] = "ecar-latents-v1"
    MADE_BY: ClassVar[str] = "ecar-data finalize FOLDER"

    count: Samples
    num_classes: Classes
    class_names: list[Visible]
    moments_shape: MomentsShape  # (2C, H, W): mean, logvar; or (C, H, W) of a deterministic encoder
    has_flip: Flag  # every sample also stores the moments of its mirrored image
    encoder: Tree  # vae.codec.EncoderIdentity.to_dict()
    preprocessing: Tree
    statistics: Tree
    shards: list[LatentEntry]
    failures: FailureCount = field(default_factory=lambda: {"count": 0, "file": None})

    @property
    def dataset_id(self) -> str:
        return _dataset_id(self)

    def check_sums(self) -> None:
        """What no field can say alone. Raises UntrustedError."""
        check_channels(self.encoder, self.moments_shape)
        check_entries(self.shards, self.count, self.num_classes, self.class_names)
        row = 0
        for entry in self.shards:
            check_tar(entry, (entry.xxh3_128, entry.sha256))
            row = check_rows(entry, entry.first_row, entry.missing, row)


AnyManifest = TypeVar("AnyManifest", bound=Manifest | ImageManifest)


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of latent shards from a folder or fsspec URL. Raises DataError as `_load` does."""
    return _load(folder, Manifest)


def load_image_manifest(folder: str | Path) -> ImageManifest:
    """Read the manifest of image shards from a folder or fsspec URL. Raises DataError as `_load` does."""
    return _load(folder, ImageManifest)


def schema_of(folder: str | Path) -> str:
    """What kind of set the manifest in `folder` says it is; empty where it says nothing.

    Raises DataError as `load_manifest`, but for what only its schema can tell.
    """
    tree = _read_tree(join(folder, MANIFEST_NAME), Manifest)
    return str(tree.get("schema", "")) if isinstance(tree, dict) else ""


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """Raises DataError for what `load_manifest` or `load_image_manifest` would refuse."""
    tree = dataclasses.asdict(manifest)
    try:
        _by_the_rules(tree, type(manifest)).check_sums()
    except UntrustedError as error:
        raise DataError(f"{folder} cannot be described in a manifest: {error}; correct that in its source") from None
    write_json(folder / MANIFEST_NAME, {"schema": manifest.SCHEMA, **tree, "dataset_id": manifest.dataset_id})


def _load(folder: str | Path, kind: type[AnyManifest]) -> AnyManifest:
    """Raises DataError: no manifest, not JSON, another schema, a field against its rule, or edited since."""
    url = join(folder, MANIFEST_NAME)
    manifest = _proven(_read_tree(url, kind), kind, redact(url))
    if isinstance(manifest, ImageManifest):
        _check_location(manifest.location, str(url))
    return manifest


def _read_tree(url: str, kind: type[AnyManifest]) -> Any:
    text = _read(url, kind)
    try:
        return parse_json(text)
    except UntrustedError as error:
        raise DataError(f"{redact(url)} is damaged: {error}; restore it, or run `{kind.MADE_BY}` again") from None


def _proven(tree: Any, kind: type[AnyManifest], where: str) -> AnyManifest:
    found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
    if found != kind.SCHEMA:
        said = printable(str(found), 80)
        raise DataError(f"{where} has schema {said}, expected {kind.SCHEMA}; give the folder made by `{kind.MADE_BY}`")
    stated = tree.pop("dataset_id", None)
    del tree["schema"]
    try:
        manifest = _by_the_rules(tree, kind)
        # first: an edit is named as one, before what it breaks
        if manifest.dataset_id != stated:
            said = printable(str(stated), 80)
            raise DataError(
                f"{where} was changed: dataset_id is {said}, its content gives {manifest.dataset_id}; restore it"
            )
        manifest.check_sums()
    except UntrustedError as error:
        raise DataError(f"{where} breaks its schema: {error}; restore it, or run `{kind.MADE_BY}` again") from None
    return manifest


def _check_location(location: str | None, url: str) -> None:
    """An index names the place of its images, which is anywhere; but not on the machine of whoever downloads it."""
    if location is None:
        return
    if is_remote(url) and not is_remote(location):
        raise DataError(
            f"{redact(url)}: location: {location} is a folder of this machine, and the manifest is not; give a URL, or "
            "copy the index here"
        )


def _by_the_rules(tree: dict[str, Any], kind: type[AnyManifest]) -> AnyManifest:
    """Each field of a manifest on its own. Raises UntrustedError naming the first that breaks its rule."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None


def _read(url: str, kind: type[AnyManifest]) -> bytes:
    """The manifest's text. Raises DataError where there is none, or no regular file, or one that is too large."""
    try:
        return read_bytes(url, limit=MAX_MANIFEST_BYTES)
    except ObjectMissing as error:
        if is_remote(url):
            raise DataError(f"{error}, or send the set there with `ecar-data push`") from None
        fix = f"did you mean {meant}?" if (meant := meant_url(url)) else f"make it with `{kind.MADE_BY}`"
        raise DataError(f"{url} does not exist; {fix}") from None


def _content(manifest: Manifest | ImageManifest) -> dict[str, Any]:
    return {"schema": manifest.SCHEMA, **dataclasses.asdict(manifest)}


def _dataset_id(manifest: Manifest | ImageManifest) -> str:
    """sha256 of the canonical JSON of everything but itself."""
    return hashlib.sha256(json.dumps(_content(manifest), sort_keys=True, separators=(",", ":")).encode()).hexdigest()
