"""Checkpoints behind a URL: `<url>/step-00001000-<attempt>/`, the objects first, the marker last.

An object store renames nothing, so the marker object alone makes a checkpoint: a prefix without it does not exist for a
reader. Files are made on a disk of the node, uploaded whole, and fetched to such a disk again, each once per node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import xxhash

from ecar_dist.errors import CheckpointError, DataError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.download import download_file
from ecar_dist.runtime.checkpoint.files import (
    MANIFEST,
    MARKER,
    MARKER_BYTES,
    DamagedError,
    Needed,
    UnreadableError,
    check_committable,
    is_checkpoint_name,
    marker_of,
    open_fragments,
    proven_manifest,
    step_of,
)
from ecar_dist.runtime.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest
from ecar_dist.runtime.checkpoint.tensor_file import WrittenFile
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.node_lock import node_lock, owned_temporary, sweep_temporaries
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import abort_uploads, join, list_files, read_object, remove, stat, upload
from ecar_dist.storage.retries import ObjectMissing, RetryPolicy, Transfer
from ecar_dist.storage.untrusted import path_inside

_SLOWEST = 8 << 20  # bytes a second; an operation on a large file gets the time that this rate takes


class BucketPlace:
    """The checkpoints of one run under `url`; `scratch` is a folder on a disk of the node."""

    def __init__(self, url: str, scratch: Path, retry: RetryPolicy | None = None) -> None:
        self._url, self.where, self._retry = url, redact(url), retry or RetryPolicy()
        self._scratch = scratch / "checkpoints" / xxhash.xxh3_64_hexdigest(url.partition("?")[0].encode())
        self._stopping = threading.Event()
        self._underway: weakref.WeakSet[threading.Event] = weakref.WeakSet()  # of transfers
        self._manifests: dict[str, Manifest] = {}  # committed ones never change

    def prepare(self) -> None:
        self.make_scratch()
        self.put(".writable", b"")
        remove(join(self._url, ".writable"), self.transfer())

    def committed(self) -> list[str]:
        return self._committed(self._objects())

    def manifest(self, name: str) -> Manifest:
        if name not in self._manifests:
            self.make_scratch()
            with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
                self._manifests[name] = self._manifest(name, Path(folder))
        return self._manifests[name]

    def whole(self) -> list[tuple[str, int]]:
        objects, found = self._objects(), []
        for name in self._committed(objects):
            with contextlib.suppress(DamagedError):
                manifest = self.manifest(name)
                if all(objects.get(f"{name}/{file.name}") == file.bytes for file in manifest.files):
                    found.append((name, manifest.progress.samples_seen))
        return found

    def fetch(self, name: str, share: tuple[int, int] = (0, 1), needed: Needed = lambda file: True) -> Path:
        self.make_scratch()
        folder = self._scratch / name
        folder.mkdir(exist_ok=True)
        manifest, kinds = self._manifest(name, folder), set[str]()
        for file in filter(needed, manifest.files):
            url, path = join(self._url, f"{name}/{file.name}"), path_inside(folder, file.name)
            with node_lock(path.with_suffix(".lock"), self._stopping):  # by one process of the node
                download_file(url, file, path, self.transfer)
            _, kinds = open_fragments(folder, manifest, file, "np", kinds)
        return folder

    def release(self, name: str) -> None:
        shutil.rmtree(self._scratch / name, ignore_errors=True)

    def draft(self, step: int, attempt: str) -> _BucketDraft:
        return _BucketDraft(self, f"step-{step:08d}-{attempt}")

    def sweep(self, keep: set[str]) -> None:
        objects = self._objects()
        for name in sorted({path.partition("/")[0] for path in objects} - keep):
            if is_checkpoint_name(name, attempt=True) and not self._is_unreadable(name, objects):
                files = sorted(path for path in objects if path.startswith(f"{name}/"))
                self._remove(sorted(files, key=lambda path: not path.endswith(f"/{MARKER}")))
                self.release(name)
        with contextlib.suppress(DataError):  # not everybody may list them; then the bucket's lifecycle rule ends them
            abort_uploads(self._url, self.transfer())

    def free_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._stopping.set()
        for stopping in list(self._underway):
            stopping.set()

    def transfer(self, size: int = 0) -> Transfer:
        """For one operation on so many bytes; ended by `close`, and by its own failure alone."""
        patience = dataclasses.replace(self._retry, deadline=self._retry.deadline + size / _SLOWEST)
        transfer = Transfer(policy=patience)
        self._underway.add(transfer.stopping)
        if self._stopping.is_set():
            transfer.stopping.set()
        return transfer

    def send(self, name: str, make: Callable[[Path], WrittenFile]) -> WrittenFile:
        """Make a file on this node and upload it; the bytes on the node are gone afterwards."""
        self.make_scratch()
        with owned_temporary(self._scratch / name.replace("/", "-")) as (temporary, _):
            written = make(temporary)
            upload(temporary, join(self._url, name), self.transfer(written.bytes))
        return dataclasses.replace(written, name=name.rpartition("/")[2])

    def put(self, name: str, content: bytes) -> None:
        """A small object."""

        def make(path: Path) -> WrittenFile:
            path.write_bytes(content)
            return WrittenFile(path.name, len(content), "")

        self.send(name, make)

    def make_scratch(self) -> None:
        try:
            self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep_temporaries(self._scratch)
        except OSError as error:
            raise CheckpointError(f"cannot use the folder {self._scratch} ({error}); set data.cache.dir") from None

    def _committed(self, objects: Mapping[str, int]) -> list[str]:
        names = (path.partition("/")[0] for path in objects if path.endswith(f"/{MARKER}"))
        ours = (name for name in names if is_checkpoint_name(name, attempt=True))
        return sorted(ours, key=lambda name: (step_of(name), name), reverse=True)

    def _objects(self) -> dict[str, int]:
        """Size of every object, by its name under the URL."""
        try:
            return dict(list_files(self._url, self.transfer()))
        except ObjectMissing:
            return {}

    def _is_unreadable(self, name: str, objects: Mapping[str, int]) -> bool:
        """Whether another version may be able to read it."""
        try:
            if f"{name}/{MARKER}" in objects:
                self.manifest(name)
        except UnreadableError:
            return True
        except DamagedError:
            pass
        return False

    def _manifest(self, name: str, folder: Path) -> Manifest:
        """What a checkpoint says of itself, which is then in `folder` too. Raises DamagedError, CheckpointError."""
        for file, limit in ((MANIFEST, MAX_MANIFEST_BYTES), (MARKER, MARKER_BYTES)):
            content = self._small_object(name, file, limit)
            with atomic_write(folder / file) as out:
                out.write(content)
        return proven_manifest(folder, name)

    def _small_object(self, name: str, file: str, limit: int) -> bytes:
        """Not read where it is larger. Raises DamagedError."""
        url = join(self._url, f"{name}/{file}")
        try:
            size = stat(url, self.transfer()).size
            if size is None:
                raise DamagedError(f"{self.where}/{name}", f"the store does not say how large {file} is")
            if size > limit:
                kind = UnreadableError if file == MANIFEST else DamagedError
                raise kind(f"{self.where}/{name}", f"{file} has {size:,} bytes, this version reads {limit:,}")
            return read_object(url, size, self.transfer(size))
        except ObjectMissing:
            raise DamagedError(f"{self.where}/{name}", f"{file} is missing") from None

    def _remove(self, paths: list[str]) -> None:
        """In this order. The marker is the first: from then on the checkpoint does not exist for a reader."""
        for path in paths:
            remove(join(self._url, path), self.transfer())
            failpoint("checkpoint.prune")


class _BucketDraft:
    def __init__(self, place: BucketPlace, name: str) -> None:
        self.name, self._place, self._marker = name, place, b""

    def write(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        return self._place.send(f"{self.name}/{file}", write)

    def prepare(self, manifest: bytes) -> None:
        check_committable(manifest, self.name)
        self._place.put(f"{self.name}/{MANIFEST}", manifest)
        self._marker = marker_of(manifest)
        failpoint("checkpoint.manifest")

    def publish(self) -> None:
        failpoint("checkpoint.rename")
        self._place.put(f"{self.name}/{MARKER}", self._marker)
        failpoint("checkpoint.renamed")

    def discard(self) -> None:
        """The next commit's sweep removes what is there: a store that fails must not hold up training."""
