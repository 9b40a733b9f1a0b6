"""Files that are either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def temporary_beside(path: Path) -> Path:
    """A name next to `path` that no other process, on this host or another, can pick."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name `path` to an OSError of the block that has none, such as a failed write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name; on success fsync and rename, on any exception remove it."""
    temporary = temporary_beside(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def claim_name(temporary: Path, path: Path) -> bool:
    """Give a finished, synced file its name, unless the name is taken: the first of several writers wins.

    A hard link checks and takes the name in one step. On file systems without hard links this checks and then renames.
    If two writers finish between these two steps, one complete file replaces the other.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if path.exists():
            return False
        os.rename(temporary, path)
    sync_to_disk(path.parent)
    return True


def write_json(path: Path, tree: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())


def sync_to_disk(path: Path) -> None:
    """fsync a file or a folder. A rename is durable only after an fsync of its folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> Path:
    """Rename a damaged file (or whatever is at its path) to the first free name of NAME.damaged-1, -2, ...

    Returns the new path, even if there was nothing to rename.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    return aside
