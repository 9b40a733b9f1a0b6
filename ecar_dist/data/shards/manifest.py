"""The two kinds of manifest: `ecar-latents-v1` (read by training) and `ecar-images-v1` (read by encoding).

Only the manifest says what belongs to a data set. To a tar reader, a tar that ends early or a missing shard looks like
a smaller set.

A manifest is checked in three steps: each field by its type (`manifest_rules.py`), the `dataset_id` against the
content, and the fields against each other (`check_sums`).
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

# A manifest of a million shards has about 300 MB.
MAX_MANIFEST_BYTES = 1 << 30

# For pydantic: no unknown fields, no NaN or infinity.
KNOWN_FIELDS = ConfigDict(extra="forbid", allow_inf_nan=False)

# ---- one shard


@dataclass(frozen=True)
class ShardEntry:
    """What a shard must be: its file name, size, number of samples, and hashes."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS

    name: RelativeName
    bytes: Bytes
    count: Samples
    first_index: Count  # index of the first sample in the set

    # xxh3 is fast, and checked at every opening. sha256 identifies the content in the dataset_id.
    xxh3_128: Xxh3
    sha256: Sha256


@dataclass(frozen=True)
class LatentEntry(ShardEntry):
    """A latent shard. The keys of its samples are consecutive rows of the encode plan, from `first_row` on.

    An image that could not be encoded leaves a gap. So the row of a sample does not depend on other samples.
    """

    first_row: Count
    missing: tuple[Count, ...] = ()  # the rows of the gaps, ascending

    @property
    def rows(self) -> np.ndarray:
        """The row in the plan of each sample, int64 [count]."""
        # The shard covers `count` rows and the gaps between them.
        reserved = np.arange(self.first_row, self.first_row + self.count + len(self.missing), dtype=np.int64)
        return np.setdiff1d(reserved, np.array(self.missing, dtype=np.int64), assume_unique=True)


@dataclass(frozen=True)
class ImageEntry(ShardEntry):
    """One tar or one class directory of encoded images. A table gives the offset and size of each image.

    For a directory (`kind` "files"), `bytes` is the sum of the sizes of its images and the hashes are empty, because
    indexing does not read the files.
    """

    table: PlainName  # a file beside the manifest
    table_xxh3_128: Xxh3
    kind: Literal["tar", "files"]


# ---- a whole set


@dataclass(frozen=True)
class ImageManifest:
    """A set of labelled encoded images: WebDataset tars, or one directory of files per class."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS
    SCHEMA: ClassVar[str] = "ecar-images-v1"
    MADE_BY: ClassVar[str] = "ecar-data shard|index SOURCE OUT"

    source: Visible
    count: Samples
    num_classes: Classes
    class_names: list[Visible]
    shards: list[ImageEntry]
    location: Visible | None = None  # folder or URL of the tars or directories; None: the manifest's own folder

    @property
    def dataset_id(self) -> str:
        """Covers the images and their order, but not their location: users may move a set and edit `location`."""
        return _dataset_id(dataclasses.replace(self, source="", location=None))

    @property
    def in_tars(self) -> bool:
        """Whether all images are in tars, which a `ShardStore` can download. Otherwise each is a file of its own."""
        return all(entry.kind == "tar" for entry in self.shards)

    def home(self, folder: str | Path) -> str | Path:
        """The folder or URL of the tars or class directories, for a manifest that was read from `folder`."""
        return folder if self.location is None else self.location

    def check_sums(self) -> None:
        """Check the fields against each other. Raises UntrustedError."""
        check_entries(self.shards, self.count, self.num_classes, self.class_names)

        # A class directory has no hashes, and its images may be of any size.
        for entry in self.shards:
            if entry.kind == "tar":
                check_tar(entry, (entry.xxh3_128, entry.sha256, entry.table_xxh3_128))


@dataclass(frozen=True)
class Manifest:
    """A set of latent shards: raw moments, labels, and everything needed to interpret them."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS
    SCHEMA: ClassVar[str] = "ecar-latents-v1"
    MADE_BY: ClassVar[str] = "ecar-data finalize FOLDER"

    count: Samples
    num_classes: Classes
    class_names: list[Visible]
    moments_shape: MomentsShape  # (2C, H, W): mean and logvar; (C, H, W) from a deterministic encoder
    has_flip: Flag  # each sample also has the moments of its mirrored image

    # Facts without a fixed schema here. The autoencoder code checks the encoder identity when it is used.
    encoder: Tree  # vae.codec.EncoderIdentity.to_dict()
    preprocessing: Tree
    statistics: Tree
    shards: list[LatentEntry]
    failures: FailureCount = field(default_factory=lambda: {"count": 0, "file": None})

    @property
    def dataset_id(self) -> str:
        return _dataset_id(self)

    def check_sums(self) -> None:
        """Check the fields against each other. Raises UntrustedError."""
        check_channels(self.encoder, self.moments_shape)
        check_entries(self.shards, self.count, self.num_classes, self.class_names)

        # The rows of the shards ascend without overlap, so every key is unique.
        row = 0
        for entry in self.shards:
            check_tar(entry, (entry.xxh3_128, entry.sha256))
            row = check_rows(entry, entry.first_row, entry.missing, row)


AnyManifest = TypeVar("AnyManifest", bound=Manifest | ImageManifest)

# ---- reading and writing


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of latent shards from a folder or fsspec URL.

    Raises DataError if it is missing, not JSON, of another schema, was edited, or breaks a rule.
    """
    return _load(folder, Manifest)


def load_image_manifest(folder: str | Path) -> ImageManifest:
    """Read the manifest of image shards from a folder or fsspec URL. Raises DataError as `load_manifest` does."""
    return _load(folder, ImageManifest)


def schema_of(folder: str | Path) -> str:
    """The schema named in the manifest in `folder`; empty if it names none.

    Raises DataError if the manifest is missing or not JSON.
    """
    # Before the kind of set is known, the commands in error messages are those of latent sets.
    tree = _read_tree(join(folder, MANIFEST_NAME), Manifest)
    return str(tree.get("schema", "")) if isinstance(tree, dict) else ""


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """Write `manifest.json`. Raises DataError for a manifest that `load_manifest` would reject."""
    # Checked as a reader would check it. Names of classes and folders come from users.
    tree = dataclasses.asdict(manifest)
    try:
        _by_the_rules(tree, type(manifest)).check_sums()
    except UntrustedError as error:
        raise DataError(f"cannot write a manifest for {folder}: {error}; fix that in its source") from None
    write_json(folder / MANIFEST_NAME, {"schema": manifest.SCHEMA, **tree, "dataset_id": manifest.dataset_id})


def _load(folder: str | Path, kind: type[AnyManifest]) -> AnyManifest:
    """A manifest of the given kind. Raises DataError as `load_manifest` does."""
    url = join(folder, MANIFEST_NAME)
    # The location is checked last, because the rule depends on where the manifest came from.
    manifest = _proven(_read_tree(url, kind), kind, redact(url))
    if isinstance(manifest, ImageManifest):
        _check_location(manifest.location, str(url))
    return manifest


def _read_tree(url: str, kind: type[AnyManifest]) -> Any:
    """The JSON value of a manifest. Raises DataError if it is missing, too large, not a regular file, or not JSON."""
    # A missing manifest usually means that the last command of a pipeline has not run yet, so the fix names it.
    try:
        text = read_bytes(url, limit=MAX_MANIFEST_BYTES)
    except ObjectMissing as error:
        if is_remote(url):
            raise DataError(f"{error}, or send the set there with `ecar-data push`") from None
        fix = f"did you mean {meant}?" if (meant := meant_url(url)) else f"make it with `{kind.MADE_BY}`"
        raise DataError(f"{url} does not exist; {fix}") from None
    try:
        return parse_json(text)
    except UntrustedError as error:
        raise DataError(f"{redact(url)} is damaged: {error}; restore it, or run `{kind.MADE_BY}` again") from None


def _proven(tree: Any, kind: type[AnyManifest], where: str) -> AnyManifest:
    """The manifest in a JSON value. Raises DataError if the schema, the dataset_id or a rule does not hold."""
    # Another schema usually means that the folder of another command was given.
    found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
    if found != kind.SCHEMA:
        said = printable(str(found), 80)
        raise DataError(f"{where} has schema {said}, expected {kind.SCHEMA}; give the folder made by `{kind.MADE_BY}`")

    # The id comes before the sums: an edit by hand is reported as an edit, not as the rule that it breaks.
    stated = tree.pop("dataset_id", None)
    del tree["schema"]
    try:
        manifest = _by_the_rules(tree, kind)
        if manifest.dataset_id != stated:
            said = printable(str(stated), 80)
            raise DataError(
                f"{where} was edited: dataset_id is {said}, its content gives {manifest.dataset_id}; restore it"
            )
        manifest.check_sums()
    except UntrustedError as error:
        raise DataError(f"{where} breaks its schema: {error}; restore it, or run `{kind.MADE_BY}` again") from None
    return manifest


def _check_location(location: str | None, url: str) -> None:
    """An index may name any folder, but an index from a URL may not name a folder of the machine that reads it."""
    # Otherwise a set from the network could make the reader open its own private files.
    if location is not None and is_remote(url) and not is_remote(location):
        raise DataError(
            f"{redact(url)} is remote, but its location {location} is a local folder; set location to a URL, or copy "
            "the index to this machine"
        )


def _by_the_rules(tree: dict[str, Any], kind: type[AnyManifest]) -> AnyManifest:
    """Check each field by its type. Raises UntrustedError that names the first field that breaks its rule."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None


def _dataset_id(manifest: Manifest | ImageManifest) -> str:
    """sha256 of the canonical JSON of all other fields."""
    # Sorted keys and no spaces: equal manifests have equal texts, whoever writes them.
    content = {"schema": manifest.SCHEMA, **dataclasses.asdict(manifest)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
