"""Where checkpoints are stored: a folder (folder.py) or a bucket (bucket.py), behind one protocol.

A checkpoint is written as a `PendingCheckpoint`, which no reader sees: first the files of the ranks, then the manifest.
The commit is one atomic operation: a rename in a folder, the marker object in a bucket.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.checkpoint.bucket import BucketStorage
from ecar_dist.runtime.checkpoint.files import DamagedError, Needed, UnreadableError, all_files, committed
from ecar_dist.runtime.checkpoint.folder import LocalStorage
from ecar_dist.runtime.checkpoint.manifest import Intervals, Manifest
from ecar_dist.runtime.checkpoint.tensor_file import WrittenFile
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.fetch import cache_folder
from ecar_dist.storage.remote import is_remote, join, local_path


class PendingCheckpoint(Protocol):
    """A checkpoint that is not committed yet. Methods raise OSError or DataError if the storage rejects the data."""

    name: str  # of the committed checkpoint
    part_bytes: int | None  # the size of a file's parts, each with its own hash; None: no parts

    def write_file(self, file: str, write: Callable[[Path], WrittenFile]) -> WrittenFile:
        """Any rank: call `write` with a local path, and store the file that it writes there, durably."""

    def write_manifest(self, manifest: bytes) -> None:
        """Rank 0, after all files: store the manifest.

        Raises CheckpointError if a file of another rank is not visible here, or if no reader would accept the manifest.
        """

    def commit(self) -> None:
        """Rank 0, last: make the checkpoint visible. It replaces a committed one of the same name."""

    def discard(self) -> None:
        """Rank 0: free the space, as far as possible without delay."""


class CheckpointStorage(Protocol):
    """The checkpoints of one run. Methods raise OSError or DataError if the storage cannot be read or changed."""

    where: str  # folder, or URL without secrets, for messages
    copies: bool  # whether `fetch` copies files, or parts of them, to a disk of the node

    def check_writable(self) -> None:
        """Rank 0, before training. Raises if nothing can be written here."""

    def committed(self) -> list[str]:
        """Names of the committed checkpoints, newest first."""

    def manifest(self, name: str) -> Manifest:
        """The manifest of a committed checkpoint. Raises DamagedError, or UnreadableError for a different version."""

    def complete(self) -> list[tuple[str, int]]:
        """(name, samples_seen), newest first, of checkpoints with a valid manifest and files of the right size."""

    def fetch(
        self,
        name: str,
        share: tuple[int, int] = (0, 1),
        needed: Needed = all_files,
        intervals: Intervals | None = None,
    ) -> Path:
        """A local folder with the manifest and all `needed` files, each verified by its hash on some rank.

        share: (rank, world size). If all ranks read the same files, each hashes its share of them. intervals: what the
        caller reads from the files. The rest of a file with parts may be absent.

        Raises DamagedError, or UnreadableError for a checkpoint of a different version.
        """

    def release(self, name: str) -> None:
        """Remove the local copy that `fetch` made on this node."""

    def new_checkpoint(self, step: int, attempt: str) -> PendingCheckpoint:
        """A checkpoint of `step` to write. All ranks pass the same arguments."""

    def keep_only(self, keep: set[str]) -> None:
        """Remove all other checkpoints and unfinished ones. Readers see each of them complete or not at all.

        Folders whose names are not ours are kept. So is a checkpoint that cannot be read now, or that a different
        version may be able to read.
        """

    def free_bytes(self) -> int | None:
        """Free space; None if it is unknown."""

    def close(self) -> None:
        """Stop transfers that are waiting."""


def open_storage(config: RunConfig, run: Path | None = None) -> CheckpointStorage:
    """The checkpoints of a run. `run` is its directory, if it was moved after training."""
    if config.checkpoint.dir:
        return storage_at(config, join(config.checkpoint.dir, config.run.name))
    return storage_at(config, str(RunDirectory(run or config.run_directory).checkpoints))


def open_ema_storage(config: RunConfig, run: Path | None = None) -> CheckpointStorage:
    """The EMA snapshots of a run, which are never removed (ema.snapshot_every_samples). `run`: see `open_storage`."""
    if config.checkpoint.dir:
        return storage_at(config, join(config.checkpoint.dir, f"{config.run.name}/ema"))
    return storage_at(config, str(RunDirectory(run or config.run_directory).ema_snapshots))


def storage_at(config: RunConfig, where: str) -> CheckpointStorage:
    """The checkpoints of one run in a folder or under a URL."""
    if is_remote(where):
        return BucketStorage(where, cache_folder(config.data.cache.dir))
    return LocalStorage(local_path(where))


def has_checkpoint(config: RunConfig) -> bool:
    """Whether the run has committed a checkpoint, damaged or not."""
    with contextlib.closing(open_storage(config)) as storage:
        return bool(storage.committed())


def check_adoption(config: RunConfig) -> None:
    """Raises ConfigError if there is no checkpoint to adopt. The message names checkpoints nearby."""
    # There is one, so there is nothing to report.
    with contextlib.closing(open_storage(config)) as storage:
        if storage.committed():
            return
        where = storage.where

    # Look in the parent folder, and in the folders next to this one: the usual mistakes.
    near: list[str] = []
    if not is_remote(where):
        above = local_path(where).parent
        folders = [above, *sorted(path for path in above.glob("*") if path.is_dir())]
        near = [f"{found[0].name} in {folder}" for folder in folders if (found := committed(folder))]

    # The user has to know where this run looks, and where else there are checkpoints.
    seen = f"but there is {', '.join(near[:3])}; copy that folder to {where}," if near else "nor nearby;"
    wrong = "checkpoint.dir, run.dir or run.name"
    raise ConfigError(f"--adopt found no checkpoint in {where}, {seen} correct {wrong}, or omit --adopt")


class PassedOver(NamedTuple):
    """A checkpoint that is not used, and why. `unreadable`: it may still be complete."""

    path: str
    problem: str
    unreadable: bool


def newest_whole(storage: CheckpointStorage) -> Path:
    """A local folder with the newest checkpoint that is not damaged.

    Warns about newer ones that are damaged. Raises CheckpointError if none can be used.
    """
    passed_over: list[PassedOver] = []
    for name in storage.committed():
        where = f"{storage.where}/{name}"
        try:
            path = storage.fetch(name)
        except DamagedError as damage:
            passed_over.append(PassedOver(where, damage.problem, isinstance(damage, UnreadableError)))
        else:
            warn_of_damage(passed_over, where)
            return path
    raise none_whole(storage.where, passed_over)


def warn_of_damage(passed_over: Iterable[PassedOver], used: object) -> None:
    """Print a warning for each checkpoint that was passed over. used: the checkpoint that is used instead."""
    for path, problem, unreadable in passed_over:
        fault = "cannot be read now, or not by this version" if unreadable else "is damaged"
        line = f"warning: checkpoint {path} {fault} ({problem}); {used} is used instead"
        print(line + ("; stop now to keep its progress" if unreadable else ""), file=sys.stderr)


def none_whole(where: object, passed_over: list[PassedOver]) -> CheckpointError:
    """The error if no checkpoint can be used."""
    if not passed_over:
        return CheckpointError(f"{where} contains no checkpoint; train first, or wait for the first save")
    return CheckpointError(
        f"all {len(passed_over)} checkpoints in {where} are damaged ({passed_over[0].path}: "
        f"{passed_over[0].problem}); restore one from a backup, or remove the folder to train from the start"
    )
