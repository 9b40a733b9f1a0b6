"""The two kinds of manifest: `ecar-latents-v1` (read by training) and `ecar-images-v1` (read by encoding).

In `ecar-latents-v2`, the entries of the shards are in a separate file, see `entries.py`.

Only the manifest states what belongs to a data set. To a tar reader, a tar that ends early or a missing shard looks
like a smaller set.

A manifest is checked in three steps: each field by its type (`manifest_rules.py`), the `dataset_id` against the
content, and the fields against each other (`check_sums`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
from pydantic import ConfigDict, ValidationError

from ecar_dist.data.shards.entries import (
    KNOWN_FIELDS,
    TABLE_NAME,
    CodebookEntry,
    ImageEntry,
    LatentEntry,
    ShardTable,
    TableRecord,
)
from ecar_dist.data.shards.manifest_rules import (
    Classes,
    FailureCount,
    Flag,
    MomentsShape,
    Samples,
    Tree,
    Visible,
    check_channels,
    check_class_names,
    check_codebooks,
    check_entries,
    check_rows,
    check_tar,
    check_total,
)
from ecar_dist.errors import DataError, reason_of
from ecar_dist.storage.atomic import atomic_write, write_json
from ecar_dist.storage.fetch import RemoteFile, cache_folder, fetch_file
from ecar_dist.storage.node_lock import node_lock
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import file_in, is_remote, join, meant_url, read_bytes
from ecar_dist.storage.retries import ObjectMissing, Transfer
from ecar_dist.storage.untrusted import (
    UntrustedError,
    adapter_of,
    first_violation,
    parse_json,
    printable,
    validate_record,
)

MANIFEST_NAME = "manifest.json"

# The entries of a million shards take about 300 MB as JSON. New sets of more than TABLE_SHARDS have a table instead.
MAX_MANIFEST_BYTES = 1 << 30
TABLE_SHARDS = 10_000
TABLE_SCHEMA = "ecar-latents-v2"


# ---- the manifest of a set


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
    attribution: Visible | None = None  # of the images, if their licence requires one; absent from the file if None

    @cached_property
    def dataset_id(self) -> str:
        """Covers the images and their order, but not their location: users may move a set and edit `location`."""
        return _dataset_id(dataclasses.replace(self, source="", location=None, attribution=None))

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of images of each shard: int64 [shards]."""
        return np.array([entry.count for entry in self.shards], dtype=np.int64)

    @property
    def in_tars(self) -> bool:
        """Whether all images are in tars, which a `ShardStore` can download. Otherwise each is a separate file."""
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
    shards: Sequence[LatentEntry]  # a list, or a ShardTable
    failures: FailureCount = field(default_factory=lambda: {"count": 0, "file": None})
    codebooks: list[CodebookEntry] = field(default_factory=list)

    @cached_property
    def dataset_id(self) -> str:
        """Covers the samples and their order, but not the codebooks: a new one does not make a different set.

        With a table, it covers the table's sha256, so its cost does not grow with the number of shards.
        """
        return _dataset_id(dataclasses.replace(self, codebooks=[]))

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of samples of each shard: int64 [shards]."""
        if isinstance(self.shards, ShardTable):
            return self.shards.counts
        return np.array([entry.count for entry in self.shards], dtype=np.int64)

    def check_sums(self) -> None:
        """Check the fields against each other. Raises UntrustedError. The entries of a table were checked with it."""
        check_channels(self.encoder, self.moments_shape)
        check_codebooks([(entry.patch_size, entry.size) for entry in self.codebooks])
        if isinstance(self.shards, ShardTable):
            check_class_names(self.num_classes, self.class_names)
            check_total(self.shards.samples, self.count)
            return
        check_entries(self.shards, self.count, self.num_classes, self.class_names)

        # The rows of the shards ascend without overlap, so every key is unique.
        row = 0
        for entry in self.shards:
            check_tar(entry, (entry.xxh3_128, entry.sha256))
            row = check_rows(entry, entry.first_row, entry.missing, row)


AnyManifest = TypeVar("AnyManifest", bound=Manifest | ImageManifest)

# ---- reading and writing


def load_manifest(folder: str | Path, cache: Path | None = None) -> Manifest:
    """Read the manifest of latent shards from a folder or fsspec URL.

    cache: root of the node's cache, for the table of a set behind a URL; None: that of `cache_folder`.

    Raises DataError if it is missing, is not JSON, has another schema, was edited, or breaks a rule.
    """
    url = join(folder, MANIFEST_NAME)
    tree = _read_tree(url, Manifest)
    if not (isinstance(tree, dict) and tree.get("schema") == TABLE_SCHEMA):
        return _proven(tree, Manifest, redact(url))

    # The table is proven by the manifest, and is opened before the id of both is compared.
    try:
        record = validate_record(json.dumps(tree.pop("table", None)).encode(), TableRecord)
        table = _open_table(folder, record, cache)
    except UntrustedError as error:
        raise DataError(f"{redact(url)} is damaged: {error}; restore it, or run `{Manifest.MADE_BY}` again") from None
    return _proven({**tree, "schema": Manifest.SCHEMA, "shards": []}, Manifest, redact(url), table)


def load_image_manifest(folder: str | Path) -> ImageManifest:
    """Read the manifest of image shards from a folder or fsspec URL. Raises DataError as `load_manifest` does."""
    url = join(folder, MANIFEST_NAME)
    # The location is checked last, because the rule depends on where the manifest came from.
    manifest = _proven(_read_tree(url, ImageManifest), ImageManifest, redact(url))
    _check_location(manifest.location, str(url))
    return manifest


def schema_of(folder: str | Path) -> str:
    """The schema named in the manifest in `folder`; empty if it names none.

    Raises DataError if the manifest is missing or not JSON.
    """
    # Before the kind of set is known, the commands in error messages are those of latent sets.
    tree = _read_tree(join(folder, MANIFEST_NAME), Manifest)
    return str(tree.get("schema", "")) if isinstance(tree, dict) else ""


def write_manifest(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """Write `manifest.json`, and the table of a manifest that has one.

    Raises DataError for a manifest that `load_manifest` would reject.
    """
    # Check it as a reader would. The names of classes and folders come from users.
    table = manifest.shards if isinstance(manifest.shards, ShardTable) else None
    tree = _content(manifest)
    try:
        fields = {name: value for name, value in tree.items() if name not in ("schema", "table")}
        _by_the_rules({"shards": [], **fields}, type(manifest), table).check_sums()
    except UntrustedError as error:
        raise DataError(f"cannot write a manifest for {folder}: {error}; fix that in its source") from None

    # Write the table first, so that a manifest never exists without it.
    if table is not None and table.path != folder / TABLE_NAME:
        with atomic_write(folder / TABLE_NAME) as copy, open(table.path, "rb") as original:
            shutil.copyfileobj(original, copy)
    write_json(folder / MANIFEST_NAME, {**tree, "dataset_id": manifest.dataset_id})


def _open_table(folder: str | Path, record: TableRecord, cache: Path | None) -> ShardTable:
    """The table of a set. Behind a URL, it is downloaded once for each node, to a file named after its sha256.

    Raises UntrustedError for a table that is not the one in `record`, DataError if it cannot be read.
    """
    if not is_remote(folder):
        try:
            return ShardTable(file_in(folder, TABLE_NAME), record)
        except UntrustedError as error:
            raise UntrustedError(f"{TABLE_NAME}: {error}") from None
        except OSError as error:
            raise UntrustedError(f"{TABLE_NAME} cannot be read ({reason_of(error)})") from None

    path = cache_folder(cache) / "tables" / f"{record.sha256}.npy"
    transfer = Transfer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with node_lock(path.with_name(f".{path.name}.lock"), transfer.stopping):
            # A cached file that is damaged is replaced.
            if path.exists():
                with contextlib.suppress(UntrustedError):
                    return ShardTable(path, record)
            fetch_file(RemoteFile(join(folder, TABLE_NAME), record.bytes, record.xxh3_128), path, transfer)
            return ShardTable(path, record)
    except OSError as error:
        raise DataError(f"cannot use the cache {path.parent} ({reason_of(error)}); set data.cache.dir") from None


def _read_tree(url: str, kind: type[AnyManifest]) -> Any:
    """The JSON value of a manifest. Raises DataError if it is missing, too large, not a regular file, or not JSON."""
    # A missing manifest usually means that the last command of a pipeline has not run yet, so the fix names it.
    try:
        text = read_bytes(url, limit=MAX_MANIFEST_BYTES)
    except ObjectMissing as error:
        if is_remote(url):
            raise DataError(f"{error}, or upload the set there with `ecar-data push`") from None
        fix = f"did you mean {meant}?" if (meant := meant_url(url)) else f"make it with `{kind.MADE_BY}`"
        raise DataError(f"{url} does not exist; {fix}") from None
    try:
        return parse_json(text)
    except UntrustedError as error:
        raise DataError(f"{redact(url)} is damaged: {error}; restore it, or run `{kind.MADE_BY}` again") from None


def _proven(tree: Any, kind: type[AnyManifest], where: str, table: ShardTable | None = None) -> AnyManifest:
    """The manifest in a JSON value and its table.

    Raises DataError if the schema or the dataset_id is wrong, or if a rule is broken.
    """
    # A different schema usually means that the folder of a different command was given.
    found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
    if found != kind.SCHEMA:
        said = printable(str(found), 80)
        raise DataError(f"{where} has schema {said}, expected {kind.SCHEMA}; give the folder made by `{kind.MADE_BY}`")

    # Check the id before the sums, so that an edit by hand is reported as an edit, not as the rule that it breaks.
    stated = tree.pop("dataset_id", None)
    del tree["schema"]
    try:
        manifest = _by_the_rules(tree, kind, table)
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
    """An index may name any folder, but an index from a URL may not name a folder on the machine that reads it."""
    # Otherwise a set from the network could make the reader open its own private files.
    if location is not None and is_remote(url) and not is_remote(location):
        raise DataError(
            f"{redact(url)} is remote, but its location {location} is a local folder; set location to a URL, or copy "
            "the index to this machine"
        )


def _by_the_rules(tree: dict[str, Any], kind: type[AnyManifest], table: ShardTable | None = None) -> AnyManifest:
    """Check each field by its type. Raises UntrustedError that names the first field that breaks its rule."""
    try:
        manifest = adapter_of(kind).validate_python(tree)
    except ValidationError as error:
        raise UntrustedError(first_violation(error)) from None
    return manifest if table is None else dataclasses.replace(cast(Any, manifest), shards=table)


def _content(manifest: Manifest | ImageManifest) -> dict[str, Any]:
    """Schema and fields as JSON values. A table is represented by the record of its file, not by its entries."""
    if isinstance(manifest.shards, ShardTable):
        tree = _fields(dataclasses.replace(manifest, shards=[]))
        del tree["shards"]
        return {"schema": TABLE_SCHEMA, **tree, "table": manifest.shards.record.model_dump()}
    return {"schema": manifest.SCHEMA, **_fields(manifest)}


def _fields(manifest: Manifest | ImageManifest) -> dict[str, Any]:
    """The fields as JSON values. Sets of earlier versions have no attribution or codebooks, and keep their ids."""
    tree = dataclasses.asdict(manifest)
    absent: dict[str, Any] = {"attribution": None, "codebooks": []}
    return {name: value for name, value in tree.items() if name not in absent or value != absent[name]}


def _dataset_id(manifest: Manifest | ImageManifest) -> str:
    """sha256 of the canonical JSON of all other fields."""
    # Sorted keys and no spaces: equal manifests have equal texts, whoever writes them.
    text = json.dumps(_content(manifest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
