"""Locks and temporary files that the kernel frees when their owner dies, however it dies.

All are based on flock: no name in shared memory, no process id that another container cannot see, nothing to clean up
by hand. Keep them on a local disk of the node: some shared file systems have no flock, or one that other nodes do not
see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from ecar_dist.errors import DataError, reason_of
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX, temporary_beside

_POLL_SECONDS = 0.05
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def node_lock(path: Path, stopping: threading.Event) -> Iterator[None]:
    """Hold the lock file `path` exclusively among all threads and processes of the node. It is removed afterwards.

    Raises DataError if `stopping` is set while waiting, or if the file system has no flock, and OSError if the file
    cannot be created.
    """
    lock = filelock.UnixFileLock(path, mode=0o600, poll_interval=_POLL_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire(cancel_check=stopping.is_set)
    except filelock.Timeout:
        raise DataError(f"waiting for {path} was stopped; run the same command again to continue") from None
    except OSError as error:
        raise _explained(error, path) from None
    try:
        yield
    finally:
        # while the lock is still held: a waiting process then sees that the file is gone, and creates a new one
        path.unlink(missing_ok=True)
        lock.release()


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed; False if it is locked already. Raises OSError without flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_open_as(file: BinaryIO | None, path: Path) -> bool:
    """Whether `file` is open, and is still the file at `path`."""
    if file is None or file.closed:
        return False
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


@contextlib.contextmanager
def owned_temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file next to `path`, opened without a buffer. It is removed at the end unless it was renamed."""
    while True:
        temporary = temporary_beside(path)
        with open(temporary, "xb+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:  # another process swept it before it was locked
                continue
            try:
                yield temporary, file
            finally:
                temporary.unlink(missing_ok=True)
            return


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporary files that dead processes of this host have left in `folder`."""
    for path in folder.glob(f".*.{socket.gethostname()}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            try:
                abandoned = try_lock(file)
            except OSError as error:
                raise _explained(error, path) from None
            if abandoned:
                path.unlink()


def _explained(error: OSError, path: Path) -> Exception:
    """The error, with a fix if it says that the file system has no flock."""
    if error.errno in _NO_FLOCK:
        return DataError(f"cannot lock {path} ({reason_of(error)}); put the cache on a local disk of the node")
    return error
