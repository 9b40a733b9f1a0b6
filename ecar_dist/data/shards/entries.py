"""The entries of a manifest: one for each shard of a set, as objects, or as the rows of a binary table.

A set of many shards keeps its entries in a separate file, `shards.npy`, next to a small `manifest.json`. The file
contains two npy arrays, one after the other:

    rows     one record for each shard, see `ShardTable.row_type`; `numpy.load` reads it
    missing  int64, the rows of the plan without a sample, for all shards, one shard after the other

The manifest states both sizes and the sha256 of the file, and each reader checks them before it uses a row. A reader
keeps the number of samples of each shard in memory, 8 bytes per shard, and reads the rows that it needs.
"""

from __future__ import annotations

import hashlib
import io
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, cast, overload

import numpy as np
import xxhash
from pydantic import ConfigDict, Field

from ecar_dist.data.shards.manifest_rules import (
    MAX_ROWS,
    Bytes,
    Count,
    PlainName,
    RelativeName,
    Samples,
    Sha256,
    Side,
    Xxh3,
    check_table_rows,
)
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.untrusted import Record, UntrustedError, open_plain_file

TABLE_NAME = "shards.npy"
MAX_TABLE_BYTES = 1 << 33  # about 80 million shards
_CHUNK = 1 << 15  # rows that are read or written at a time

# For pydantic: no unknown fields, no NaN or infinity.
KNOWN_FIELDS = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ShardEntry:
    """What a shard must be: its file name, size, number of samples, and hashes."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS

    name: RelativeName
    bytes: Bytes
    count: Samples
    first_index: Count  # index of the first sample in the set

    # xxh3 is fast, and checked whenever the shard is opened. sha256 identifies the content in the dataset_id.
    xxh3_128: Xxh3
    sha256: Sha256


@dataclass(frozen=True)
class LatentEntry(ShardEntry):
    """A latent shard. The keys of its samples are consecutive rows of the encode plan, beginning at `first_row`.

    An image that could not be encoded leaves a gap. So the row of a sample does not depend on other samples.
    """

    first_row: Count
    missing: tuple[Count, ...] = ()  # the rows of the gaps, ascending

    @property
    def rows(self) -> np.ndarray:
        """The row in the plan of each sample, int64 [count]."""
        # The shard covers `count` rows and the gaps between them.
        reserved = np.arange(self.first_row, self.first_row + self.count + len(self.missing), dtype=np.int64)
        return np.setdiff1d(reserved, np.array(self.missing, dtype=np.int64), assume_unique=True)


@dataclass(frozen=True)
class CodebookEntry:
    """A codebook next to the shards (`ecar-data fit-codebook`): V codes of C p^2 numbers for tokens of p x p."""

    __pydantic_config__: ClassVar[ConfigDict] = KNOWN_FIELDS

    name: PlainName
    sha256: Sha256
    bytes: Bytes
    size: Side  # V
    patch_size: Side  # p
    encoder_sha256: Sha256  # of the encoder and normalisation that it was fitted to


@dataclass(frozen=True)
class ImageEntry(ShardEntry):
    """One tar or one class directory of encoded images. A table gives the offset and size of each image.

    For a directory (`kind` "files"), `bytes` is the sum of the sizes of its images and the hashes are empty, because
    indexing does not read the files.
    """

    table: PlainName  # a file next to the manifest
    table_xxh3_128: Xxh3
    kind: Literal["tar", "files"]


class TableRecord(Record):
    """What a manifest states about its `shards.npy`."""

    shards: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    missing: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    name_bytes: Annotated[int, Field(ge=1, le=255)]  # of the longest name
    bytes: Annotated[int, Field(ge=1, le=MAX_TABLE_BYTES)]
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardTable(Sequence[LatentEntry]):
    """The entries of a latent set in a `shards.npy`, which is read row by row.

    Attributes: `record`, what the manifest states about the file; `path`; `samples`, the number in all shards; and
    `counts`, int64 [shards], the samples of each shard, in memory.

    Opening reads the file once, in pieces. Raises UntrustedError if it is not the file that `record` describes, or if
    a row breaks a rule of `check_table_rows`; OSError if it cannot be read.
    """

    def __init__(self, path: Path, record: TableRecord) -> None:
        self.record = record
        self.path = path
        self._type = ShardTable.row_type(record.name_bytes)
        self._header = _header(self._type, record.shards)
        gaps = _header(np.dtype("<i8"), record.missing)
        self._missing_start = len(self._header) + record.shards * self._type.itemsize + len(gaps)
        if record.bytes != self._missing_start + 8 * record.missing:
            raise UntrustedError(f"{record.shards} shards cannot have {record.bytes} bytes")

        # The descriptor stays open, so a file that replaces this one later is not mixed with it.
        with open_plain_file(path, record.bytes) as file:
            _prove(file, record)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        if self._read(0, len(self._header)) != self._header:
            raise UntrustedError(f"it is not npy 1.0 with {record.shards} names of {record.name_bytes} bytes")
        if self._read(self._missing_start - len(gaps), len(gaps)) != gaps:
            raise UntrustedError(f"it does not end with {record.missing} missing rows")

        # Check all rules at once, for many rows at a time.
        self.counts = np.empty(record.shards, dtype=np.int64)
        before = None
        for first in range(0, record.shards, _CHUNK):
            rows = self._rows(first, min(first + _CHUNK, record.shards))
            before = check_table_rows(rows, self._missing_of(rows), before)
            self.counts[first : first + len(rows)] = rows["count"]
        assert before is not None
        self.samples = before.samples
        if before.missing != record.missing:
            raise UntrustedError(f"its shards have {before.missing} missing rows, the manifest says {record.missing}")

    @staticmethod
    def row_type(name_bytes: int) -> np.dtype:
        """One shard: the fields of a LatentEntry, packed. `missing` rows begin at `missing_at` in the second array."""
        numbers = ("bytes", "count", "first_index", "first_row", "missing_at", "missing")
        fields: list[Any] = [("name", f"S{name_bytes}"), *((name, "<i8") for name in numbers)]
        return np.dtype([*fields, ("xxh3_128", "V16"), ("sha256", "V32")])

    def __len__(self) -> int:
        return self.record.shards

    @overload
    def __getitem__(self, index: int) -> LatentEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[LatentEntry]: ...

    def __getitem__(self, index: int | slice) -> LatentEntry | list[LatentEntry]:
        """Raises IndexError, and DataError if the file cannot be read."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return next(self._entries(self._rows(place, place + 1)))

    def __iter__(self) -> Iterator[LatentEntry]:
        for first in range(0, len(self), _CHUNK):
            yield from self._entries(self._rows(first, min(first + _CHUNK, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and other.record == self.record

    __hash__ = None  # type: ignore[assignment]

    def find(self, name: str) -> int | None:
        """The index of the shard with this file name; None if there is none. Reads about log2(shards) rows."""
        wanted = _by_length(name.encode("utf-8", "surrogatepass"))
        low = 0
        high = len(self)
        while low < high:
            middle = (low + high) // 2
            found = _by_length(self._rows(middle, middle + 1)["name"].item())
            if found == wanted:
                return middle
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None

    def _entries(self, rows: np.ndarray) -> Iterator[LatentEntry]:
        missing = self._missing_of(rows).tolist()
        at = 0
        for name, size, count, first_index, first_row, _, gaps, fast, strong in rows.tolist():
            part = tuple(missing[at : at + gaps])
            yield LatentEntry(name.decode(), size, count, first_index, fast.hex(), strong.hex(), first_row, part)
            at += gaps

    def _rows(self, first: int, stop: int) -> np.ndarray:
        size = self._type.itemsize
        return np.frombuffer(self._read(len(self._header) + first * size, (stop - first) * size), self._type)

    def _missing_of(self, rows: np.ndarray) -> np.ndarray:
        """The missing rows of consecutive shards, int64. Empty if the rows cannot be valid."""
        number = int(np.clip(rows["missing"], 0, self.record.missing).sum())
        start = int(rows["missing_at"][0])
        if not number or start < 0 or start + number > self.record.missing:
            return np.empty(0, dtype=np.int64)
        return np.frombuffer(self._read(self._missing_start + 8 * start, 8 * number), "<i8")

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file. Raises DataError if it cannot be read."""
        # Not mapped, because reading a map of a truncated file would kill the process.
        try:
            content = os.pread(self._descriptor, size, start)
        except OSError as error:
            raise DataError(f"cannot read {self.path} ({error.strerror}); check its disk, and start again") from None
        if len(content) != size:
            raise DataError(f"{self.path} was truncated while it was in use; restore it")
        return content


def write_table(folder: Path, entries: Iterable[LatentEntry], shards: int, name_bytes: int) -> TableRecord:
    """Write `shards.npy` for `shards` entries with names of at most `name_bytes` bytes. Returns its record.

    The entries are read one at a time, and only their missing rows are kept. Raises OSError if it cannot be written.
    """
    row_type = ShardTable.row_type(name_bytes)
    missing: list[int] = []
    rows: list[tuple[Any, ...]] = []
    with atomic_write(folder / TABLE_NAME) as raw:
        file = _Hashed(raw)
        file.write(_header(row_type, shards))
        # A row for each shard, in chunks.
        for entry in entries:
            numbers = (entry.bytes, entry.count, entry.first_index, entry.first_row, len(missing), len(entry.missing))
            hashes = (bytes.fromhex(entry.xxh3_128), bytes.fromhex(entry.sha256))
            rows.append((entry.name.encode(), *numbers, *hashes))
            missing += entry.missing
            if len(rows) == _CHUNK:
                file.write(np.array(rows, row_type).tobytes())
                rows.clear()
        # The rest of the rows, then the missing rows of all shards, which the shards point to.
        file.write(np.array(rows, row_type).tobytes())
        file.write(_header(np.dtype("<i8"), len(missing)))
        file.write(np.array(missing, "<i8").tobytes())
    return TableRecord(
        shards=shards,
        missing=len(missing),
        name_bytes=name_bytes,
        bytes=file.size,
        xxh3_128=file.fast.hexdigest(),
        sha256=file.strong.hexdigest(),
    )


class _Hashed:
    """A file that is being written, with its size and hashes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.fast = xxhash.xxh3_128()
        self.strong = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self.size += len(content)
        self.fast.update(content)
        self.strong.update(content)


def _prove(file: BinaryIO, record: TableRecord) -> None:
    """Raises UntrustedError unless the complete file has the stated size and sha256."""
    size = os.fstat(file.fileno()).st_size
    if size != record.bytes:
        raise UntrustedError(f"it has {size} bytes, the manifest says {record.bytes}")
    found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    if found != record.sha256:
        raise UntrustedError(f"it has sha256 {found}, the manifest says {record.sha256}")


def _header(row_type: np.dtype, length: int) -> bytes:
    """The header of an npy 1.0 file with an array [length]."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(row_type), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _by_length(name: bytes) -> tuple[int, bytes]:
    """Names are sorted by length first, so that 999999.tar comes before 1000000.tar."""
    return len(name), name
