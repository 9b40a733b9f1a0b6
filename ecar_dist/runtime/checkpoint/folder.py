"""Where checkpoints lie: a folder, or a bucket (checkpoint_bucket), by one protocol.

A checkpoint is put together as a Draft that no reader sees. Its files come first, then the manifest; publishing it is
one step that cannot be seen half-done: a rename here, the marker object in a bucket.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ecar_dist.config.run import RunConfig
from ecar_dist.data.shards.cache import CacheOptions
from ecar_dist.errors import CheckpointError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.bucket import BucketPlace
from ecar_dist.runtime.checkpoint.files import (
    MANIFEST,
    MARKER,
    DamagedError,
    Needed,
    PassedOver,
    UnreadableError,
    check_committable,
    committed,
    has_marker,
    is_checkpoint_name,
    is_unfinished_name,
    marker_of,
    none_whole,
    proven_manifest,
    sized_file,
    verify,
    warn_of_damage,
)
from ecar_dist.runtime.checkpoint.manifest import Manifest, RankFile
from ecar_dist.runtime.checkpoint.tensor_file import WrittenFile
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.atomic import sync_to_disk
from ecar_dist.storage.remote import is_remote, join, local_path
from ecar_dist.storage.untrusted import printable


class Draft(Protocol):
    """A checkpoint in the making. Methods raise OSError or DataError where the place does not take it."""

    name: str  # once it is published

    def write(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        """Any rank: have `write` make a file at the path it is given, and bring that to the place, durably."""

    def prepare(self, manifest: bytes) -> None:
        """Rank 0, when all files are there. Raises CheckpointError where this rank does not see them, or where no
        reader would take what is to be committed."""

    def publish(self) -> None:
        """Rank 0, last: from here on the checkpoint exists, in the place of one of the same name."""

    def discard(self) -> None:
        """Rank 0: give the space back, as far as that takes no time."""


class CheckpointPlace(Protocol):
    """The checkpoints of one run. Methods raise OSError or DataError where the place cannot be read or changed."""

    where: str  # for messages, without secrets

    def prepare(self) -> None:
        """Rank 0, before training: raises where nothing can be written here."""

    def committed(self) -> list[str]:
        """Names of the committed checkpoints, newest first."""

    def manifest(self, name: str) -> Manifest:
        """What a committed checkpoint says of itself. Raises DamagedError, UnreadableError for another version's."""

    def whole(self) -> list[tuple[str, int]]:
        """(name, samples_seen), newest first, of those that are whole as far as can be seen without reading them."""

    def fetch(self, name: str, share: tuple[int, int] = (0, 1), needed: Needed = lambda file: True) -> Path:
        """A folder with the manifest and all files that are `needed`, each compared with its hash by somebody.

        Of `share` (rank, world size), where all ranks see the same files, each hashes its part of them. Raises
        DamagedError, and UnreadableError for a checkpoint of another version.
        """

    def release(self, name: str) -> None:
        """Give back the disk space that fetching took on this node."""

    def draft(self, step: int, attempt: str) -> Draft:
        """All ranks give the same two."""

    def sweep(self, keep: set[str]) -> None:
        """Remove all other checkpoints, and what was left half-made; a reader sees each whole, or not at all.

        What is not named as we name it stays, and so does a checkpoint that cannot be read now, or that another
        version may read.
        """

    def free_bytes(self) -> int | None:
        """Space for more; None where nobody can tell."""

    def close(self) -> None:
        """End waiting transfers."""


def open_place(config: RunConfig, run: Path | None = None) -> CheckpointPlace:
    """Where the checkpoints of a run lie; `run` is its directory, which may have moved since it was trained."""
    if config.checkpoint.dir:
        return place_at(config, join(config.checkpoint.dir, config.run.name))
    return place_at(config, str(RunDirectory(run or config.run_directory).checkpoints))


def open_ema_place(config: RunConfig, run: Path | None = None) -> CheckpointPlace:
    """Where copies of the averages alone are kept for good (ema.snapshot_every_samples)."""
    if config.checkpoint.dir:
        return place_at(config, join(config.checkpoint.dir, f"{config.run.name}/ema"))
    return place_at(config, str(RunDirectory(run or config.run_directory).averages))


def place_at(config: RunConfig, where: str) -> CheckpointPlace:
    """A folder or URL that holds the checkpoints of one run."""
    if not is_remote(where):
        return LocalPlace(local_path(where))
    cache = config.data.cache.dir
    return BucketPlace(where, CacheOptions(root=Path(cache) if cache else None).folder)


def newest_whole(place: CheckpointPlace) -> Path:
    """The newest checkpoint that is whole, fetched; damaged ones are warned of. Raises CheckpointError without one."""
    passed_over: list[PassedOver] = []
    for name in place.committed():
        where = f"{place.where}/{name}"
        try:
            path = place.fetch(name)
        except DamagedError as damage:
            passed_over.append(PassedOver(where, damage.problem, isinstance(damage, UnreadableError)))
            continue
        warn_of_damage(passed_over, where)
        return path
    raise none_whole(place.where, passed_over)


class LocalPlace:
    """A folder that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.where = folder, str(folder)

    def prepare(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise CheckpointError(f"cannot make {self._folder} ({error.strerror}); set checkpoint.dir") from None
        if not os.access(self._folder, os.W_OK):
            raise CheckpointError(f"{self._folder} cannot be written to; change its rights, or set checkpoint.dir")
        others = [
            path.name for path in self._folder.iterdir() if not is_unfinished_name(path.name) and has_marker(path)
        ]
        if others and not self.committed():
            raise CheckpointError(
                f"{self._folder} holds no checkpoint but {printable(min(others))}, which may be one by another name; "
                f"rename it to step- and its step in 8 digits, or move it away to train from the start"
            )

    def committed(self) -> list[str]:
        return [path.name for path in committed(self._folder)]

    def manifest(self, name: str) -> Manifest:
        return proven_manifest(self._folder / name)

    def whole(self) -> list[tuple[str, int]]:
        found = []
        for path in committed(self._folder):
            try:
                manifest = proven_manifest(path)
                for file in manifest.files:
                    sized_file(path, file)
            except DamagedError:
                continue
            found.append((path.name, manifest.progress.samples_seen))
        return found

    def fetch(self, name: str, share: tuple[int, int] = (0, 1), needed: Needed = lambda file: True) -> Path:
        verify(self._folder / name, *share)
        return self._folder / name

    def release(self, name: str) -> None:
        """Nothing was copied."""

    def draft(self, step: int, attempt: str) -> Draft:
        return _LocalDraft(self._folder, f"step-{step:08d}", attempt)

    def sweep(self, keep: set[str]) -> None:
        for path in sorted([*self._folder.glob("step-*"), *self._folder.glob("tmp-*")]):
            ours = is_checkpoint_name(path.name) or is_unfinished_name(path.name)
            if ours and path.name not in keep and not path.is_symlink() and not self._is_unreadable(path):
                _remove(path)

    def _is_unreadable(self, path: Path) -> bool:
        """Whether it may be whole, though it cannot be read now, or not by this version."""
        try:
            if has_marker(path):
                for file in self.manifest(path.name).files:
                    sized_file(path, file)
        except UnreadableError:
            return True
        except DamagedError:
            pass
        return False

    def free_bytes(self) -> int | None:
        return room(self._folder)

    def close(self) -> None:
        """No transfer ever waits."""


class _LocalDraft:
    def __init__(self, folder: Path, name: str, attempt: str) -> None:
        self.name, self._folder = name, folder
        self._temporary = folder / f"tmp-{name}-{attempt}"

    def write(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        self._temporary.mkdir(parents=True, exist_ok=True, mode=0o755)
        return write(self._temporary / file)

    def prepare(self, manifest: bytes) -> None:
        for file in check_committable(manifest, self.name).files:
            self._check_seen(file)
        self._write(MANIFEST, manifest)
        failpoint("checkpoint.manifest")
        self._write(MARKER, marker_of(manifest))
        sync_to_disk(self._temporary)

    def publish(self) -> None:
        final = self._folder / self.name
        failpoint("checkpoint.rename")
        if final.exists():  # of an attempt that this one has gone back behind
            os.rename(final, self._temporary.with_name(f"{self._temporary.name}-old"))
        os.rename(self._temporary, final)
        sync_to_disk(self._folder)
        failpoint("checkpoint.renamed")

    def discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _check_seen(self, file: RankFile) -> None:
        """A rank of another node may have written to a disk of its own."""
        try:
            sized_file(self._temporary, file)
        except DamagedError:
            raise CheckpointError(
                f"{file.name} was written and is not in {self._folder} on the node of rank 0; set checkpoint.dir "
                f"to a folder that all nodes see"
            ) from None

    def _write(self, name: str, content: bytes) -> None:
        (self._temporary / name).write_bytes(content)
        sync_to_disk(self._temporary / name)


def _remove(path: Path) -> None:
    """The marker goes first: from then on the checkpoint does not exist for a reader."""
    if has_marker(path):
        (path / MARKER).unlink()
        sync_to_disk(path)
    failpoint("checkpoint.prune")
    shutil.rmtree(path, ignore_errors=True)


def room(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
