"""The hash that verifies a file: xxh3_128, in hexadecimal."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import xxhash

# Bytes. Small enough to stay in the core's cache between the read and the hash. Not smaller, because after each chunk
# the thread may have to wait for the interpreter lock.
_CHUNK = 1 << 20


def hash_file(path: Path) -> str:
    """The hash of a file. Raises OSError if it cannot be read."""
    with open(path, "rb", buffering=0) as file:
        return hash_open_file(file)


def hash_open_file(file: BinaryIO) -> str:
    """The hash of an open file, from its start.

    The file is read, not mapped: page faults read a cold file at a third of the disk's rate or less. Reads also leave
    the file in the page cache, where a later map finds it.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    file.seek(0)
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest.hexdigest()
