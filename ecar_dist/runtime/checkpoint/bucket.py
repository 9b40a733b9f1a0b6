"""Checkpoints under a URL: `<url>/step-00001000-<attempt>/`. The files are written first, the marker last.

An object store cannot rename, so the marker object alone commits a checkpoint. Readers ignore a prefix without a
marker. Each file is completed on a local disk of the node, then uploaded. Readers download it to a local disk, once per
node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import xxhash

from ecar_dist.errors import CheckpointError, DataError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.files import (
    MANIFEST,
    MARKER,
    MARKER_BYTES,
    DamagedError,
    Needed,
    UnreadableError,
    all_files,
    check_committable,
    is_checkpoint_name,
    marker_of,
    open_fragments,
    proven_manifest,
    readable,
    step_of,
)
from ecar_dist.runtime.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    VALUE_BYTES,
    Intervals,
    Manifest,
    RankFile,
    header_limit,
    overlaps,
)
from ecar_dist.runtime.checkpoint.tensor_file import TensorIndex, WrittenFile, read_index
from ecar_dist.storage.atomic import DISK_FULL, atomic_write
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.fetch import RemoteFile, WrongContentError, fetch_file, stat_sized
from ecar_dist.storage.hashing import hash_file
from ecar_dist.storage.node_lock import node_lock, owned_temporary, sweep_temporaries
from ecar_dist.storage.parts import fetch_parts
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import (
    abort_uploads,
    join,
    list_files,
    read_object,
    read_range,
    remove,
    remove_many,
    stat,
    upload,
)
from ecar_dist.storage.retries import ObjectMissing, RetryPolicy, Transfer
from ecar_dist.storage.untrusted import UntrustedError, path_inside

PART_BYTES = 1 << 16  # docs/scale.md lists how much a node copies with this size
_FILES_AT_ONCE = 8
_MOSTLY = 0.75  # of a file's values; if more are needed, the complete file is copied
_SLOWEST = 8 << 20  # bytes per second; the deadline of a transfer grows with its size at this rate


class BucketStorage:
    """The checkpoints of one run under `url`. Local copies go to a subfolder of `cache`, on a disk of the node."""

    copies = True

    def __init__(self, url: str, cache: Path, retry: RetryPolicy | None = None) -> None:
        self.where = redact(url)
        self._url = url
        self._retry = retry or RetryPolicy()
        self._scratch = cache / "checkpoints" / xxhash.xxh3_64_hexdigest(url.partition("?")[0].encode())
        self._stopping = threading.Event()
        self._transfers: weakref.WeakSet[threading.Event] = weakref.WeakSet()  # the `stopping` event of each
        self._manifests: dict[str, Manifest] = {}  # a committed manifest never changes

    def check_writable(self) -> None:
        # Only an attempt shows whether the credentials allow writing and removing.
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

    def complete(self) -> list[tuple[str, int]]:
        # One listing returns the sizes of all objects.
        objects = self._objects()
        found = []
        for name in self._committed(objects):
            with contextlib.suppress(DamagedError):
                manifest = self.manifest(name)
                if all(objects.get(f"{name}/{file.name}") == file.bytes for file in manifest.files):
                    found.append((name, manifest.progress.samples_seen))
        return found

    def fetch(
        self,
        name: str,
        share: tuple[int, int] = (0, 1),
        needed: Needed = all_files,
        intervals: Intervals | None = None,
    ) -> Path:
        self.make_scratch()
        folder = self._scratch / name
        folder.mkdir(exist_ok=True)
        manifest = self._manifest(name, folder)

        # One process per node downloads. The others wait, then find the file.
        def copy(file: RankFile, wanted: Intervals | None = None) -> None:
            with node_lock(path_inside(folder, file.name).with_suffix(".lock"), self._stopping):
                self._download(name, file, folder, manifest, wanted)

        # Slices are small requests that mostly wait, so fetch several files at once. Full files use their own threads.
        files = needed(manifest)
        sparse = [file for file in files if intervals is not None and _is_sparse(file, manifest, intervals)]
        with DaemonPool(min(_FILES_AT_ONCE, len(sparse)), "slices") as pool:
            errors = pool.errors_of(partial(copy, wanted=intervals), sparse)
        if errors:
            raise min(errors, key=lambda error: not isinstance(error, DamagedError))
        begun = {file.name for file in sparse}
        for file in files:
            if file.name not in begun:
                copy(file)

        kinds: set[str] = set()
        for file in files:
            _, kinds = open_fragments(folder, manifest, file, "np", kinds)
        return folder

    def release(self, name: str) -> None:
        shutil.rmtree(self._scratch / name, ignore_errors=True)

    def new_checkpoint(self, step: int, attempt: str) -> _PendingObjects:
        return _PendingObjects(self, f"step-{step:08d}-{attempt}")

    def keep_only(self, keep: set[str]) -> None:
        # Checkpoints without a marker are left over from failed saves, so they are removed too.
        objects = self._objects()
        for name in sorted({path.partition("/")[0] for path in objects} - keep):
            if is_checkpoint_name(name, attempt=True) and not self._is_unreadable(name, objects):
                self._remove(name, objects)

        # Not every account may list uploads. In that case a lifecycle rule of the bucket removes them.
        with contextlib.suppress(DataError):
            abort_uploads(self._url, self.transfer())

    def free_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._stopping.set()
        for stopping in list(self._transfers):
            stopping.set()

    def transfer(self, size: int = 0) -> Transfer:
        """A transfer for one operation on `size` bytes. It is stopped by its own failure or by `close`."""
        # Each transfer has its own event, so that one failure does not stop the others.
        policy = dataclasses.replace(self._retry, deadline=self._retry.deadline + size / _SLOWEST)
        transfer = Transfer(policy=policy)
        self._transfers.add(transfer.stopping)
        if self._stopping.is_set():
            transfer.stopping.set()
        return transfer

    def send(self, name: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        """Write a file on this node, upload it as `name`, and remove the local copy."""
        self.make_scratch()
        with owned_temporary(self._scratch / name.replace("/", "-")) as (temporary, _):
            written = write(temporary)
            upload(temporary, join(self._url, name), self.transfer(written.bytes))
        return dataclasses.replace(written, name=name.rpartition("/")[2])

    def put(self, name: str, content: bytes) -> None:
        """Upload a small object."""

        def write(path: Path) -> WrittenFile:
            path.write_bytes(content)
            return WrittenFile(path.name, len(content), "")

        self.send(name, write)

    def make_scratch(self) -> None:
        try:
            self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep_temporaries(self._scratch)
        except OSError as error:
            raise CheckpointError(f"cannot use the folder {self._scratch} ({error}); set data.cache.dir") from None

    def _objects(self) -> dict[str, int]:
        """The size of every object, by its name under the URL."""
        try:
            return dict(list_files(self._url, self.transfer()))
        except ObjectMissing:
            return {}

    def _committed(self, objects: Mapping[str, int]) -> list[str]:
        # Several attempts may have committed the same step. Their names decide which is newer, so all ranks agree.
        names = (path.partition("/")[0] for path in objects if path.endswith(f"/{MARKER}"))
        ours = (name for name in names if is_checkpoint_name(name, attempt=True))
        return sorted(ours, key=lambda name: (step_of(name), name), reverse=True)

    def _is_unreadable(self, name: str, objects: Mapping[str, int]) -> bool:
        """Whether a different version may be able to read this checkpoint."""
        try:
            if f"{name}/{MARKER}" in objects:
                self.manifest(name)
        except UnreadableError:
            return True
        except DamagedError:
            pass
        return False

    def _manifest(self, name: str, folder: Path) -> Manifest:
        """Download a checkpoint's manifest and marker to `folder`. Raises DamagedError or CheckpointError."""
        # All readers of checkpoints expect these files in the folder.
        for file, limit in ((MANIFEST, MAX_MANIFEST_BYTES), (MARKER, MARKER_BYTES)):
            content = self._small_object(name, file, limit)
            with atomic_write(folder / file) as out:
                out.write(content)
        try:
            return proven_manifest(folder, name)
        except DamagedError as damage:
            # The user knows the URL, not the local folder.
            raise type(damage)(f"{self.where}/{name}", damage.problem) from None

    def _small_object(self, name: str, file: str, limit: int) -> bytes:
        """The content of an object of at most `limit` bytes; a larger one is not read. Raises DamagedError."""
        where = f"{self.where}/{name}"
        url = join(self._url, f"{name}/{file}")
        try:
            size = stat(url, self.transfer()).size
            if size is None:
                raise DamagedError(where, f"the store does not report the size of {file}")
            if size > limit:
                kind = UnreadableError if file == MANIFEST else DamagedError
                raise kind(where, f"{file} has {size:,} bytes, this version reads at most {limit:,}")
            return read_object(url, size, self.transfer(size))
        except ObjectMissing:
            raise DamagedError(where, f"{file} is missing") from None

    def _download(self, name: str, file: RankFile, folder: Path, manifest: Manifest, wanted: Intervals | None) -> None:
        """Make sure that `folder` contains `file`, or the wanted parts of it, verified by hash.

        Raises DamagedError if the object is missing or its content differs, DataError if the store is unreachable,
        CheckpointError if the node's disk is full.
        """
        path = path_inside(folder, file.name)
        remote = RemoteFile(join(self._url, f"{name}/{file.name}"), file.bytes, file.xxh3_128)
        try:
            if wanted is not None:
                self._fetch_slices(remote, path, file, manifest, wanted)
            # Another process on the node, or an earlier attempt, may have downloaded it.
            elif not (path.exists() and path.stat().st_size == file.bytes and hash_file(path) == file.xxh3_128):
                fetch_file(remote, path, self.transfer(file.bytes))
        except UntrustedError as error:
            raise DamagedError(redact(remote.url), f"{file.name} {error}") from None
        except ObjectMissing:
            raise DamagedError(redact(remote.url), f"{file.name} is missing") from None
        except WrongContentError as error:
            raise DamagedError(redact(remote.url), f"{file.name} {error.problem}") from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            found = os.statvfs(folder)
            raise CheckpointError(
                f"{folder} is full: {file.name} needs {readable(file.bytes)}, "
                f"{readable(found.f_bavail * found.f_frsize)} are free; set data.cache.dir to a larger disk on the node"
            ) from None

    def _fetch_slices(
        self, remote: RemoteFile, path: Path, file: RankFile, manifest: Manifest, intervals: Intervals
    ) -> None:
        """Copy the header, the table of parts, and the parts that contain any element of the intervals.

        Raises the errors of `fetch_parts`, and UntrustedError if the bytes differ from what was written.
        """
        if not path.exists() or path.stat().st_size != file.bytes:
            with open(path, "wb") as new:
                new.truncate(file.bytes)
        pieces = list(file.pieces(manifest.shapes))
        transfer = self.transfer(file.bytes)
        index = _proven_index(remote, path, file, header_limit(pieces, manifest.most_kinds), transfer)

        # Where each piece is in the file, for every kind of state.
        places: dict[str, list[tuple[int, int]]] = {}
        for name, place in index.tensors.items():
            places.setdefault(name.partition(":")[2], []).append(place)
        ranges = []
        for piece in pieces:
            wanted = list(overlaps(piece, intervals))
            for start, stop in places.get(f"{piece.name}:{piece.start}", ()) if wanted else ():
                if stop - start != VALUE_BYTES * piece.numel:
                    raise UntrustedError(f"has {stop - start} bytes for {piece.numel} values of {piece.name}")
                first = start - VALUE_BYTES * piece.start
                ranges += [(first + VALUE_BYTES * low, first + VALUE_BYTES * high) for low, high in wanted]
        fetch_parts(remote, path, index.table, index.table.parts_of(ranges), transfer)

    def _remove(self, name: str, objects: Mapping[str, int]) -> None:
        """Remove a checkpoint. Its marker is removed first: from then on no reader sees the checkpoint."""
        marker = f"{name}/{MARKER}"
        if marker in objects:
            remove(join(self._url, marker), self.transfer())
        failpoint("checkpoint.prune")

        # Remove the files of all ranks in a few requests.
        files = sorted(path for path in objects if path.startswith(f"{name}/") and path != marker)
        remove_many([join(self._url, path) for path in files], self.transfer())
        failpoint("checkpoint.prune")
        self.release(name)


def _is_sparse(file: RankFile, manifest: Manifest, intervals: Intervals) -> bool:
    """Whether so little of a file is needed that only parts of it are copied."""
    if not file.in_slices:
        return False
    pieces = list(file.pieces(manifest.shapes))
    wanted = sum(high - low for piece in pieces for low, high in overlaps(piece, intervals))
    return wanted <= _MOSTLY * sum(piece.numel for piece in pieces)


def _proven_index(remote: RemoteFile, path: Path, file: RankFile, limit: int, transfer: Transfer) -> TensorIndex:
    """The verified header and table of a file with parts. Both are in the local file afterwards."""
    assert file.parts is not None
    proof = file.parts.bytes, file.parts.xxh3_128
    with open(path, "r+b", buffering=0) as local:

        def read_local(start: int, stop: int) -> bytes:
            return os.pread(local.fileno(), stop - start, start)

        # Another process on the node may have copied them.
        with contextlib.suppress(UntrustedError):
            return read_index(read_local, file.bytes, limit, *proof)

        # The connection may have caused a wrong hash, so try once more.
        stat_sized(remote, transfer)
        read = partial(read_range, remote.url, transfer=transfer)
        try:
            index = read_index(read, file.bytes, limit, *proof)
        except UntrustedError:
            index = read_index(read, file.bytes, limit, *proof)
        os.pwrite(local.fileno(), index.head, 0)
        os.pwrite(local.fileno(), index.table.digests, index.table.stop)
    return index


class _PendingObjects:
    part_bytes: int | None = PART_BYTES

    def __init__(self, storage: BucketStorage, name: str) -> None:
        self.name = name
        self._storage = storage
        self._marker = b""

    def write_file(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        return self._storage.send(f"{self.name}/{file}", write)

    def write_manifest(self, manifest: bytes) -> None:
        check_committable(manifest, self.name)
        self._storage.put(f"{self.name}/{MANIFEST}", manifest)
        self._marker = marker_of(manifest)
        failpoint("checkpoint.manifest")

    def commit(self) -> None:
        failpoint("checkpoint.rename")
        self._storage.put(f"{self.name}/{MARKER}", self._marker)
        failpoint("checkpoint.renamed")

    def discard(self) -> None:
        """Does nothing now: a failing store would block training. `keep_only` removes the objects later."""
