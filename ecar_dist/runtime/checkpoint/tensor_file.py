"""Write a safetensors file one tensor at a time, and hash it while writing.

The library's own `save_file` needs all tensors in memory. The format (github.com/huggingface/safetensors): eight bytes
with the length of the header, the header in JSON, then the values of the tensors, little-endian.

A file may have hashes of its parts: its last tensor is then the table of hashes (`storage/parts.py`) of all values
before it. The writer returns one hash of header and table. A reader verifies both with it, then only the parts that it
reads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from ecar_dist.runtime.checkpoint.manifest import PARTS
from ecar_dist.storage.parts import DIGEST_BYTES, PartHasher, PartTable, table_bytes
from ecar_dist.storage.untrusted import UntrustedError, parse_object

_BLOCK = 4 << 20  # bytes written at a time
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor to write. `make` is called once, when the tensor is written, and its result is not kept."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A finished file, as a manifest describes it."""

    name: str
    bytes: int
    xxh3_128: str
    parts: dict[str, int | str] | None = None  # bytes of a part, and the xxh3_128 of header and table


def write_tensor_file(
    path: Path,
    entries: Sequence[TensorEntry],
    metadata: Mapping[str, str] | None = None,
    halfway: Callable[[], object] = lambda: None,
    part_bytes: int | None = None,
) -> WrittenFile:
    """Write `entries` to `path`, and fsync. This needs memory for one tensor; CPU tensors are not copied.

    Wider types come first, as in the library, so that all values are aligned. Otherwise the order is kept.

    Args:
        path: an unfinished file stays there after an error, so use a temporary name.
        halfway: called once, after half of the bytes.
        part_bytes: the size of the parts that have a hash in the file; None: no parts.

    Raises OSError, and ValueError if a tensor's type or shape differs from its entry.
    """
    # Values are written as they are in memory.
    if sys.byteorder != "little":
        raise OSError("safetensors files are little-endian, this machine is not")

    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    values = sum(entry.bytes for entry in ordered)
    hasher = None if part_bytes is None else PartHasher(part_bytes)
    if hasher is not None:
        ordered.append(_table_entry(hasher, values))
    header = _header(ordered, metadata)
    total = len(header) + sum(entry.bytes for entry in ordered)
    written = 0
    digest = xxhash.xxh3_128()

    # One pass over the values: write, hash, count. The table is made after all of them.
    with open(path, "wb") as file:
        for block in _blocks(header, ordered):
            file.write(block)
            digest.update(block)
            if hasher is not None and len(header) <= written < len(header) + values:
                hasher.update(block)
            if written < total / 2 <= written + len(block):
                halfway()
            written += len(block)
            block.release()  # frees the tensor before the next one is made
        file.flush()
        os.fsync(file.fileno())
    if hasher is None:
        return WrittenFile(path.name, written, digest.hexdigest())
    proof = xxhash.xxh3_128_hexdigest(header + hasher.table())
    return WrittenFile(path.name, written, digest.hexdigest(), {"bytes": hasher.size, "xxh3_128": proof})


def _table_entry(hasher: PartHasher, values: int) -> TensorEntry:
    """The table for `values` bytes. It is created once all of them have been hashed."""

    def make() -> torch.Tensor:
        return torch.tensor(list(hasher.table()), dtype=torch.uint8)

    return TensorEntry(PARTS, torch.uint8, (table_bytes(values, hasher.size),), make)


@dataclass(frozen=True)
class TensorIndex:
    """Where the tensors of a file with parts are (bytes [start, stop) by name), and the hashes of the parts.

    `head` is the file up to its first value.
    """

    tensors: dict[str, tuple[int, int]]
    table: PartTable
    head: bytes


def read_index(
    read: Callable[[int, int], bytes], size: int, most_header: int, part_bytes: int, proof: str
) -> TensorIndex:
    """The index of a file of `size` bytes with parts, verified by the hash of header and table.

    `read(start, stop)` returns bytes of the file. Raises UntrustedError if they differ from what was written.
    """
    length = int.from_bytes(read(0, 8), "little")
    if not 0 < length <= min(most_header, size - 8):
        raise UntrustedError(f"has a header of {length:,} bytes, expected at most {most_header:,}")
    head = read(0, 8 + length)

    # The table is at the end of the file: v bytes of values come first, then 16 bytes for each part of them.
    rest = size - len(head)
    values = rest - DIGEST_BYTES * -(-rest // (part_bytes + DIGEST_BYTES))
    digests = read(len(head) + values, size)
    if len(head) != 8 + length or xxhash.xxh3_128_hexdigest(head + digests) != proof:
        raise UntrustedError("has a header or table of parts that does not match the manifest")

    # A correct hash does not prove that the header is valid: somebody may have written both.
    tensors = {}
    for name, about in parse_object(head[8:]).items():
        offsets = about.get("data_offsets") if isinstance(about, dict) else None
        if name == "__metadata__":
            continue
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(one) is int for one in offsets)):
            raise UntrustedError("has a header without offsets")
        start, stop = offsets
        if not 0 <= start <= stop <= (rest if name == PARTS else values):
            raise UntrustedError(f"has a tensor at bytes {start} to {stop} of {values}")
        tensors[name] = (len(head) + start, len(head) + stop)
    if tensors.pop(PARTS, None) != (len(head) + values, size):
        raise UntrustedError("has no table of parts at its end")
    return TensorIndex(tensors, PartTable(len(head), len(head) + values, part_bytes, digests), head)


def file_bytes(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> int:
    """The size of the file that `write_tensor_file` would write."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    return len(_header(ordered, metadata)) + sum(entry.bytes for entry in entries)


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None) -> bytes:
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        tree[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, entries: Sequence[TensorEntry]) -> Iterator[memoryview]:
    yield memoryview(header)
    for entry in entries:
        with _bytes_of(entry) as values:
            for start in range(0, len(values), _BLOCK):
                yield values[start : start + _BLOCK]


def _bytes_of(entry: TensorEntry) -> memoryview:
    tensor = entry.make().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
        raise ValueError(f"{entry.name} must be {entry.dtype} {entry.shape}, is {tensor.dtype} {(*tensor.shape,)}")
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
