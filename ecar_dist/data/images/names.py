"""The original file names of the images in a shard: `NNNNNN.names` next to the tar, for messages and lists of failures.

One line per sample: its key, a tab, the file name relative to the source. The bytes of the tar and the id of the data
set do not depend on it. Without this file, messages show only the key.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.retries import Transfer
from ecar_dist.storage.untrusted import printable

NAMES_SUFFIX = ".names"
_LIMIT = 256 << 20  # bytes; 10,000 samples need about 500 kB


def readable(name: str) -> str:
    """A file name on one line. Bytes that are not UTF-8 and characters that are not printable are escaped: `\\xff`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def write_names(path: Path, names: Iterable[tuple[str, str]]) -> None:
    """Write (key, name) pairs. The file is complete or absent."""
    with atomic_write(path) as file:
        for key, name in names:
            file.write(f"{readable(key)}\t{readable(name)}\n".encode())


def read_names(folder: str | Path, tar: str, transfer: Transfer) -> dict[str, str]:
    """Names by key; empty if they cannot be read, because they only make messages more helpful."""
    where = remote.join(folder, tar.removesuffix(".tar") + NAMES_SUFFIX)
    try:
        data = remote.read_bytes(where, transfer, limit=_LIMIT)
    except DataError:
        return {}
    lines = (line.partition("\t") for line in data.decode("utf-8", "replace").split("\n"))
    return {key: printable(name) for key, tab, name in lines if tab}
