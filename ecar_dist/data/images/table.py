"""The table of the images in one tar or one class directory: key, label, offset, size and hash of each image.

It is written once, when the images are indexed or packed. It is a plain `.npy` file with rows of fixed width (24 bytes
plus the longest key), which numpy reads without unpickling.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.untrusted import MAX_NAME_BYTES, printable

MAX_IMAGE_BYTES = 256 << 20  # the encoded image is read into memory as a whole
UNKNOWN_HASH = 0  # for files in a directory, which indexing does not read


class ImageRow(NamedTuple):
    """`key` is the key of the sample in a tar, or the name of the file in a directory. `offset` is 0 in a directory."""

    key: str
    label: int
    offset: int
    size: int
    xxh3_64: int


def largest_table(count: int) -> int:
    """The largest size in bytes of a table of `count` images."""
    return 1024 + count * _dtype(MAX_NAME_BYTES).itemsize


def encode_table(rows: Sequence[ImageRow]) -> bytes:
    """The `.npy` file of a table. Equal rows give equal bytes."""
    keys = [row.key.encode("utf-8", "surrogateescape") for row in rows]
    table = np.empty(len(rows), _dtype(max(map(len, keys), default=1)))
    table["key"] = keys
    for column, name in enumerate(ImageRow._fields[1:], 1):
        table[name] = [row[column] for row in rows]
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def write_table(path: Path, rows: Sequence[ImageRow]) -> str:
    """Write the table and return its xxh3_128. The file is complete or absent."""
    data = encode_table(rows)
    with atomic_write(path) as file:
        file.write(data)
    return xxhash.xxh3_128_hexdigest(data)


def decode_table(data: bytes, entry: ImageEntry, num_classes: int, where: str) -> np.ndarray:
    """A structured array [count] with the fields of ImageRow, `key` as bytes.

    Raises DataError that names `where` if the hash is not that of the manifest, or if a row does not fit the shard.
    """
    found = xxhash.xxh3_128_hexdigest(data)
    if found != entry.table_xxh3_128:
        raise DataError(f"{where} has xxh3_128 {found}, the manifest says {entry.table_xxh3_128}; {_AGAIN}")

    # A correct hash does not prove that the table is valid: the same person may have written both.
    try:
        table = _array_in(data)
    except (ValueError, EOFError, MemoryError, RecursionError) as error:  # the header is parsed as Python
        raise DataError(f"{where} is not a table ({printable(str(error))}); {_AGAIN}") from None
    names = table.dtype.names or ()
    if names != ImageRow._fields or table.dtype != _dtype(table.dtype["key"].itemsize):
        raise DataError(f"{where} has dtype {table.dtype}, expected the fields {ImageRow._fields}; {_AGAIN}")
    if table.shape != (entry.count,):
        raise DataError(f"{where} has shape {table.shape}, the manifest says {entry.count} images; {_AGAIN}")

    _check_rows(table, entry, num_classes, where)
    _check_keys(table["key"], where)
    return table


def _array_in(data: bytes) -> np.ndarray:
    """The array of a `.npy` file (format 1.0) as a view. `np.load` would allocate any size that the header states."""
    buffer = io.BytesIO(data)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("it is not of format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - buffer.tell():
        raise ValueError(f"{len(data)} bytes do not match shape {shape} of {dtype}")
    return np.frombuffer(data, dtype, offset=buffer.tell()).reshape(shape)


def key_of(row: np.void) -> str:
    return row["key"].decode("utf-8", "surrogateescape")


def _check_rows(table: np.ndarray, entry: ImageEntry, num_classes: int, where: str) -> None:
    faults = {
        f"label, labels are 0..{num_classes - 1}": (table["label"] < 0) | (table["label"] >= num_classes),
        f"offset in a shard of {entry.bytes} bytes": (table["offset"] < 0)
        | (table["offset"] > entry.bytes - table["size"].astype(np.int64)),
        f"size, the limit is {MAX_IMAGE_BYTES} bytes": table["size"] > MAX_IMAGE_BYTES,
    }
    for what, bad in faults.items():
        if bad.any():
            row = table[int(bad.argmax())]
            raise DataError(f"{where}: row {row} of {entry.name} has a wrong {what}; {_AGAIN}")


def _check_keys(keys: np.ndarray, where: str) -> None:
    """Check that the keys have no control characters: they appear in messages and lists, and a NUL ends a path."""
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), -1)
    control = (letters < 0x20) | (letters == 0x7F)
    padding = np.arange(letters.shape[1]) >= np.char.str_len(keys)[:, None]
    bad = (control & ~padding).any(axis=1)
    if bad.any():
        key = bytes(keys[int(bad.argmax())])
        raise DataError(f"{where}: key {key!r} has characters that are not printable; {_AGAIN}")


def _dtype(key_bytes: int) -> np.dtype:
    fields = [("key", f"S{key_bytes}"), ("label", "<i4"), ("offset", "<i8"), ("size", "<u4"), ("xxh3_64", "<u8")]
    return np.dtype(fields)


_AGAIN = "restore it, or run the command that made this folder again"
