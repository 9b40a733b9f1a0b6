"""`ecar-data push`: upload a finished set to an object store.

`manifest.json` is uploaded last, so a reader never sees an incomplete set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from data_tools.progress import progress
from ecar_dist.data.images.names import NAMES_SUFFIX
from ecar_dist.data.shards.entries import TABLE_NAME, ImageEntry, ShardEntry, ShardTable
from ecar_dist.data.shards.manifest import (
    MANIFEST_NAME,
    ImageManifest,
    Manifest,
    load_image_manifest,
    load_manifest,
    write_manifest,
)
from ecar_dist.data.shards.proof import check_presence, local_folder, map_verified
from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import ObjectVersion, file_in, is_remote, join, stat, upload
from ecar_dist.storage.retries import ObjectMissing, Transfer

_CHUNK = 1 << 20
_PART_SIZES = tuple(
    size << 20 for size in (5, 8, 15, 16, 25, 32, 50, 64, 100, 128)
)  # bytes; those of common S3 clients


def push(folder: Path, url: str, threads: int = 8, transfer: Transfer | None = None) -> None:
    """Upload a set of latent or image shards. After a failure, run it again: it skips files that the store already has.

    The store has a file if the size matches and the ETag is the MD5 of its bytes, as S3 computes it. The size alone
    proves nothing, since all shards of a set have the same size. Raises DataError if the set is damaged, the URL has a
    different set, or the store fails.
    """
    transfer = transfer or Transfer()
    if not is_remote(url):
        raise DataError(f"push uploads to a URL such as s3://bucket/set, got {url}; to copy to a folder, use cp")
    manifest = _load(folder)
    _refuse_another_set(url, manifest)
    files = {file.name: file for file in _files_of(folder, manifest)}.values()

    # All files except the manifest, several at once.
    sent = 0
    bar = progress(sum(file.path.stat().st_size for file in files), "B", "push")
    pool = DaemonPool(threads, "push")
    with bar, pool, transfer.stopped_by_errors():
        sending = {pool.submit(_send, file, url, transfer): file for file in files}
        for done in as_completed(sending):
            sent += done.result()
            bar.update(sending[done].path.stat().st_size)

    sent += _send_manifest(manifest, url, transfer)
    print(f"{redact(url)}: {len(files) + 1} files, {sent} sent, dataset_id {manifest.dataset_id}")


@dataclass(frozen=True)
class _File:
    name: str  # in the set
    path: Path
    entry: ShardEntry | None = None  # only for a shard, whose hash is checked before it is sent


def _load(folder: Path) -> Manifest | ImageManifest:
    try:
        return load_manifest(folder)
    except DataError as not_latents:
        try:
            return load_image_manifest(folder)
        except DataError:
            raise not_latents from None


def _refuse_another_set(url: str, manifest: Manifest | ImageManifest) -> None:
    try:
        stat(join(url, MANIFEST_NAME))
    except ObjectMissing:
        return
    there = (load_manifest if isinstance(manifest, Manifest) else load_image_manifest)(url)
    if there.dataset_id != manifest.dataset_id:
        raise DataError(
            f"{redact(url)} has data set {there.dataset_id[:12]}, not {manifest.dataset_id[:12]}; push to another URL"
        )


def _files_of(folder: Path, manifest: Manifest | ImageManifest) -> Iterator[_File]:
    """Shards with their sidecars; tables of image sets; errors.jsonl of latent sets."""
    # The tars of an image set may be elsewhere. Then there is nothing to upload.
    home = folder if isinstance(manifest, Manifest) else manifest.home(folder)
    if is_remote(home):
        raise DataError(
            f"{folder} is an index of {redact(home)}, and only sets with shards of their own can be pushed; "
            f"copy the images with `ecar-data shard {folder} OUT` and push OUT"
        )
    home = local_folder(home)
    if any(isinstance(entry, ImageEntry) and entry.kind != "tar" for entry in manifest.shards):
        raise DataError(
            f"{folder} is an index of image files; copy them with `ecar-data shard {folder} OUT` and push OUT"
        )
    check_presence(home, manifest.shards)

    for entry in manifest.shards:
        yield _File(entry.name, file_in(home, entry.name), entry)
        for suffix in (".idx", ".json", NAMES_SUFFIX):
            name = str(Path(entry.name).with_suffix(suffix))
            if (beside := file_in(home, name)).exists():
                yield _File(name, beside)
        if isinstance(entry, ImageEntry):
            yield _File(entry.table, file_in(folder, entry.table))
    if isinstance(manifest, Manifest):
        for codebook in manifest.codebooks:
            yield _File(codebook.name, file_in(folder, codebook.name))
    if isinstance(manifest, Manifest) and manifest.failures["file"]:
        yield _File(manifest.failures["file"], file_in(folder, manifest.failures["file"]))
    if isinstance(manifest.shards, ShardTable):
        yield _File(TABLE_NAME, folder / TABLE_NAME)


def _send(file: _File, folder_url: str, transfer: Transfer) -> bool:
    """Upload a file unless the store has it; True if it was uploaded. Raises DataError if it arrived damaged."""
    url = join(folder_url, file.name)
    if file.entry is not None:
        map_verified(file.path, file.entry).close()
    try:
        if _same_bytes(file.path, stat(url, transfer)):
            return False
    except ObjectMissing:
        pass
    upload(file.path, url, transfer)
    if _same_bytes(file.path, stat(url, transfer)) is False:
        raise DataError(
            f"{redact(url)} differs from {file.path} after the upload; stop other writers to this URL and push again"
        )
    return True


def _send_manifest(manifest: Manifest | ImageManifest, url: str, transfer: Transfer) -> bool:
    """Upload the manifest and read it back. An image manifest then refers to the shards next to it."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(manifest, ImageManifest):
            manifest = dataclasses.replace(manifest, location=None)
        write_manifest(Path(folder), manifest)
        sent = _send(_File(MANIFEST_NAME, Path(folder) / MANIFEST_NAME), url, transfer)
    _refuse_another_set(url, manifest)
    return sent


def _same_bytes(path: Path, version: ObjectVersion) -> bool | None:
    """True if the object has the bytes of the file, False if not, None if its ETag does not tell.

    An object that was uploaded in one request has the MD5 of its bytes as ETag. One that was uploaded in parts has the
    MD5 of the MD5s of its parts, and the number of parts. The part size is not recorded, so the usual ones are tried.
    """
    size = path.stat().st_size
    if version.size != size:
        return False
    matched = re.fullmatch(r'"?([0-9a-f]{32})(?:-(\d+))?"?', version.tag or "")
    if matched is None:
        return None
    parts = int(matched[2] or 0)
    if parts == 0:
        return _md5(path, size).hex() == matched[1]
    fitting = [part for part in _PART_SIZES if -(-size // part) == parts]
    same = any(hashlib.md5(_md5(path, part)).hexdigest() == matched[1] for part in fitting)
    return same or None


def _md5(path: Path, part: int) -> bytes:
    """The MD5s of the parts of a file, concatenated."""
    digests: list[bytes] = []
    with open(path, "rb") as file:
        while True:
            digest = hashlib.md5()
            left = part
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            if left == part:
                return b"".join(digests)
            digests.append(digest.digest())
