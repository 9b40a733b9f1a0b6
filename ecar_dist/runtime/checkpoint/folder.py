"""Checkpoints in a folder that all ranks see: written under a temporary name, committed by a rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ecar_dist.errors import CheckpointError, reason_of
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.checkpoint.files import (
    MANIFEST,
    MARKER,
    DamagedError,
    Needed,
    UnreadableError,
    all_files,
    check_committable,
    committed,
    has_marker,
    is_checkpoint_name,
    is_unfinished_name,
    marker_of,
    proven_manifest,
    sized_file,
    verify,
)
from ecar_dist.runtime.checkpoint.manifest import Intervals, Manifest
from ecar_dist.runtime.checkpoint.tensor_file import WrittenFile
from ecar_dist.storage.atomic import sync_to_disk
from ecar_dist.storage.untrusted import printable


class LocalStorage:
    """The checkpoints of one run in `folder`. See `CheckpointStorage`."""

    copies = False

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def check_writable(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise CheckpointError(f"cannot make {self._folder} ({reason_of(error)}); set checkpoint.dir") from None
        if not os.access(self._folder, os.W_OK):
            raise CheckpointError(f"{self._folder} is not writable; change its permissions, or set checkpoint.dir")

        # A folder with only renamed checkpoints must not look empty: training would start from the beginning.
        others = [
            path.name for path in self._folder.iterdir() if not is_unfinished_name(path.name) and has_marker(path)
        ]
        if others and not self.committed():
            raise CheckpointError(
                f"{self._folder} has no checkpoint, but {printable(min(others))} may be one under another name; "
                f"rename it to step-NNNNNNNN (its step in 8 digits), or move it away to train from the start"
            )

    def committed(self) -> list[str]:
        return [path.name for path in committed(self._folder)]

    def manifest(self, name: str) -> Manifest:
        return proven_manifest(self._folder / name)

    def complete(self) -> list[tuple[str, int]]:
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

    def fetch(
        self,
        name: str,
        share: tuple[int, int] = (0, 1),
        needed: Needed = all_files,
        intervals: Intervals | None = None,
    ) -> Path:
        """The checkpoint itself: every rank sees all files, and hashes its share of them."""
        verify(self._folder / name, *share)
        return self._folder / name

    def release(self, name: str) -> None:
        """Nothing was copied."""

    def new_checkpoint(self, step: int, attempt: str) -> _PendingFolder:
        return _PendingFolder(self._folder, f"step-{step:08d}", attempt)

    def keep_only(self, keep: set[str]) -> None:
        for path in sorted([*self._folder.glob("step-*"), *self._folder.glob("tmp-*")]):
            ours = is_checkpoint_name(path.name) or is_unfinished_name(path.name)
            if ours and path.name not in keep and not path.is_symlink() and not self._is_unreadable(path):
                _remove(path)

    def _is_unreadable(self, path: Path) -> bool:
        """Whether a checkpoint may be complete, although it cannot be read now or by this version."""
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
        # The folder may not exist yet. Its nearest existing parent is on the same disk.
        folder = self._folder
        while not folder.exists():
            folder = folder.parent
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """There are no transfers."""


class _PendingFolder:
    """A checkpoint under a temporary name. See `PendingCheckpoint`."""

    part_bytes: int | None = None  # all ranks see the complete files

    def __init__(self, folder: Path, name: str, attempt: str) -> None:
        self.name = name
        self._folder = folder
        self._temporary = folder / f"tmp-{name}-{attempt}"

    def write_file(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        self._temporary.mkdir(parents=True, exist_ok=True, mode=0o755)
        return write(self._temporary / file)

    def write_manifest(self, manifest: bytes) -> None:
        # A rank on another node may have written to a disk that only that node sees.
        for file in check_committable(manifest, self.name).files:
            try:
                sized_file(self._temporary, file)
            except DamagedError:
                raise CheckpointError(
                    f"{file.name} was written, but rank 0 cannot see it in {self._folder}; set checkpoint.dir to a "
                    f"folder that all nodes see"
                ) from None

        # Manifest and marker are on disk before the rename gives the checkpoint its name.
        self._write(MANIFEST, manifest)
        failpoint("checkpoint.manifest")
        self._write(MARKER, marker_of(manifest))
        sync_to_disk(self._temporary)

    def commit(self) -> None:
        final = self._folder / self.name
        failpoint("checkpoint.rename")

        # An earlier attempt has committed this step, and this attempt resumed from an earlier step.
        if final.exists():
            os.rename(final, self._temporary.with_name(f"{self._temporary.name}-old"))

        # The commit itself. It is durable once the folder is on disk.
        os.rename(self._temporary, final)
        sync_to_disk(self._folder)
        failpoint("checkpoint.renamed")

    def discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _write(self, name: str, content: bytes) -> None:
        (self._temporary / name).write_bytes(content)
        sync_to_disk(self._temporary / name)


def _remove(path: Path) -> None:
    """Remove a checkpoint. Its marker is removed first: from then on no reader sees the checkpoint."""
    if has_marker(path):
        (path / MARKER).unlink()
        sync_to_disk(path)
    failpoint("checkpoint.prune")
    shutil.rmtree(path, ignore_errors=True)
