"""Locks and temporary files that the kernel frees when their owner dies, however it dies.

Both rest on flock: no name in shared memory, no process id that another container cannot see, nothing to clean up by
hand. Keep them on a disk of the node: some shared file systems have no flock, or one that other nodes do not see.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX, temporary_beside

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def node_lock(path: Path, stopping: threading.Event) -> Iterator[None]:
    """Hold the lock file `path` alone, among all threads and processes of the node; it is gone afterwards.

    Raises DataError when `stopping` is set while waiting, or where the file system has no flock.
    """
    handle = _acquire(path, stopping)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is no longer the lock
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may share the handle and keep it open
        os.close(handle)


def _acquire(path: Path, stopping: threading.Event) -> int:
    # polled: nothing could end the wait of a blocking flock
    while not stopping.is_set():
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        held = False
        try:
            held = _try_flock(handle, path) and _is_still(path, handle)
        finally:
            if not held:
                os.close(handle)
        if held:
            return handle
        stopping.wait(_POLL_SECONDS)
    raise DataError(f"waiting for {path} was stopped; start again to go on")


def _try_flock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(f"cannot lock {path} ({error.strerror}); put the cache on a disk of the node") from None
    return True


def _is_still(path: Path, handle: int) -> bool:
    """The file was not removed by its last holder between our open and our lock."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def owned_temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, open without a buffer; removed at the end unless it was renamed."""
    while True:
        temporary = temporary_beside(path)
        with open(temporary, "xb+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(temporary, file.fileno()):  # swept between its making and its lock
                continue
            try:
                yield temporary, file
            finally:
                temporary.unlink(missing_ok=True)
            return


def sweep_temporaries(folder: Path) -> None:
    """Remove what dead processes of this host have left in `folder`."""
    for path in folder.glob(f".*.{socket.gethostname()}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if _try_flock(file.fileno(), path):
                path.unlink()
