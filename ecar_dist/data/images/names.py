"""What the files of an image shard were called: `NNNNNN.names` beside the tar, for messages and lists of failures.

A line for each sample: its key, a tab, the file's name relative to its source. The tar's bytes do not depend on it, and
neither does the identity of a set: without the file, messages have the key alone.
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
_LIMIT = 256 << 20  # bytes; 10,000 samples have about 500 kB


def readable(name: str) -> str:
    """A file's name on one line: what is not UTF-8 or not printable is escaped, as `\\xff`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def write_names(path: Path, names: Iterable[tuple[str, str]]) -> None:
    """Write (key, name) pairs whole or not at all."""
    with atomic_write(path) as file:
        for key, name in names:
            file.write(f"{readable(key)}\t{readable(name)}\n".encode())


def read_names(folder: str | Path, tar: str, transfer: Transfer) -> dict[str, str]:
    """Names by key; empty where they are not known. They are a help to people: no reader stops for them."""
    where = remote.join(folder, tar.removesuffix(".tar") + NAMES_SUFFIX)
    try:
        data = remote.read_bytes(where, transfer, limit=_LIMIT)
    except DataError:
        return {}
    lines = (line.partition("\t") for line in data.decode("utf-8", "replace").split("\n"))
    return {key: printable(name) for key, tab, name in lines if tab}
