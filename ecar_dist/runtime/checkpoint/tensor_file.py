"""Write a safetensors file one tensor at a time, and hash it on the way.

The library's own `save_file` needs all tensors in memory. The format (github.com/huggingface/safetensors): eight bytes
with the length of the header, the header in JSON, then the values of the tensors, little-endian.
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


def write_tensor_file(
    path: Path,
    entries: Sequence[TensorEntry],
    metadata: Mapping[str, str] | None = None,
    halfway: Callable[[], object] = lambda: None,
) -> WrittenFile:
    """Write `entries` to `path`, and fsync. This needs memory for one tensor; CPU tensors are not copied.

    Wider types come first, as in the library, so that all values are aligned. Otherwise the order stays.

    Args:
        path: an unfinished file stays there after an error, so use a temporary name.
        halfway: called once, after half of the bytes.

    Raises OSError, and ValueError if a tensor has another type or shape than its entry.
    """
    # Values are written as they are in memory.
    if sys.byteorder != "little":
        raise OSError("safetensors files are little-endian, this machine is not")

    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(ordered, metadata)
    total = len(header) + sum(entry.bytes for entry in ordered)
    written = 0
    digest = xxhash.xxh3_128()

    # One pass over the values: write, hash, count.
    with open(path, "wb") as file:
        for block in _blocks(header, ordered):
            file.write(block)
            digest.update(block)
            if written < total / 2 <= written + len(block):
                halfway()
            written += len(block)
            block.release()  # frees the tensor before the next one is made
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, written, digest.hexdigest())


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
