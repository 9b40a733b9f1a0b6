"""Read one latent shard: prove it once, then gather rows from a strided view of the mapped tar."""

from __future__ import annotations

import json
import mmap
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from ecar_dist.data.manifest import LatentEntry, Manifest
from ecar_dist.data.shard_files import map_verified
from ecar_dist.data.shard_layout import (
    DESCRIPTION_NAME,
    LABEL_BYTES,
    MOMENTS_DTYPE,
    Member,
    ShardLayout,
    npy_header,
    sample_key,
)
from ecar_dist.data.tar_index import BLOCK
from ecar_dist.errors import DataError

# Fields of a USTAR header: name 0:100, size 124:136, checksum 148:156, type 156, magic and version 257:265.
_MAGIC = np.frombuffer(b"ustar\x0000", dtype=np.uint8)


class LatentShard:
    """A verified, mapped shard. `moments` is fp16 [count, *shape] without a copy; `labels` is int64 [count].

    Raises DataError, naming shard and member, where size, hash, structure or a label differ from the manifest.
    """

    def __init__(self, path: Path, entry: LatentEntry, manifest: Manifest) -> None:
        self.path, self.entry = path, entry
        self.layout = ShardLayout.of(entry.count, manifest.moments_shape, manifest.has_flip)
        self._mapped = map_verified(path, entry)
        if len(self._mapped) < self.layout.end + BLOCK:
            raise self._wrong(f"has room for fewer than {entry.count} samples of {self.layout.stride} bytes")
        for member in self.layout.members:
            self._check_headers(member)
        arrays = [self._array_view(member) for member in self.layout.members if member.npy_header_len]
        self.moments, self.flipped = arrays[0], arrays[1] if manifest.has_flip else None
        self.labels = self._read_labels(manifest.num_classes)

    def gather(self, rows: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Copy rows (int64 [N], within the shard): fp16 [N, *shape], mirrored where `flip` (bool [N]) is set."""
        gathered = self.moments[rows]
        if flip is not None and self.flipped is not None:
            gathered[flip] = self.flipped[rows[flip]]
        return gathered

    def description(self) -> dict[str, Any]:
        """The content of `.ecar.json`: layout, keys, CRCs, encoder, plan id."""
        header = tarfile.TarInfo.frombuf(self._mapped[self.layout.end : self.layout.end + BLOCK], "ascii", "strict")
        if header.name != DESCRIPTION_NAME:
            raise self._wrong(f"ends with member {header.name!r} instead of {DESCRIPTION_NAME}")
        start = self.layout.end + BLOCK
        return json.loads(self._mapped[start : start + header.size])

    def sample_bytes(self, row: int) -> bytes:
        """The payloads of one sample laid end to end: what its CRC-32 covers."""
        start = self.layout.first_offset + row * self.layout.stride
        parts = []
        for member in self.layout.members:
            at = start + member.rel_offset
            parts.append(self._mapped[at : at + member.nbytes] if member.nbytes else self._label_text(row))
        return b"".join(parts)

    def _label_text(self, row: int) -> bytes:
        return bytes(self._strided(self.layout.members[-1].rel_offset, LABEL_BYTES)[row]).rstrip(b"\0")

    def _strided(self, rel_offset: int, width: int) -> np.ndarray:
        """The same `width` bytes of every sample: uint8 [count, width]."""
        return _view(self._mapped, (self.layout.count, width), np.dtype(np.uint8), self.layout, rel_offset)

    def _array_view(self, member: Member) -> np.ndarray:
        headers = self._strided(member.rel_offset, member.npy_header_len)
        if (headers != np.frombuffer(npy_header(member.shape), dtype=np.uint8)).any():
            raise self._wrong(f"has a {member.ext} that is not npy 1.0 fp16 {list(member.shape)}")
        shape = (self.layout.count, *member.shape)
        return _view(self._mapped, shape, MOMENTS_DTYPE, self.layout, member.rel_offset + member.npy_header_len)

    def _check_headers(self, member: Member) -> None:
        """Names, sizes, checksums and types of one member of all samples at once."""
        headers = self._strided(member.rel_offset - BLOCK, BLOCK)
        first = self.entry.first_index
        wanted = np.array(
            [f"{sample_key(first + row)}.{member.ext}".encode() for row in range(self.layout.count)], "S100"
        )
        sums = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
        faults = {
            "name": _text(headers, 0, 100) != wanted,
            "magic": (headers[:, 257:265] != _MAGIC).any(axis=1) | (headers[:, 156] != ord("0")),
            "checksum": _octal(headers, 148, 154) != sums,
        }
        if member.nbytes is not None:
            faults["size"] = _octal(headers, 124, 135) != member.nbytes
        for what, bad in faults.items():
            if bad.any():
                raise self._wrong(f"has a wrong tar {what} at {wanted[int(bad.argmax())].decode()}")

    def _read_labels(self, num_classes: int) -> np.ndarray:
        texts = _text(self._strided(self.layout.members[-1].rel_offset, LABEL_BYTES), 0, LABEL_BYTES)
        try:
            labels = texts.astype(np.int64)
        except ValueError as error:
            raise self._wrong(f"has a label that is no number ({error})") from None
        outside = (labels < 0) | (labels >= num_classes)
        if outside.any():
            row = int(outside.argmax())
            key = sample_key(self.entry.first_index + row)
            raise self._wrong(f"has label {labels[row]} at key {key}, labels are 0..{num_classes - 1}")
        return labels

    def _wrong(self, what: str) -> DataError:
        return DataError(f"shard {self.path} {what}; write it again with `ecar-data encode`, or restore the file")


def _view(
    mapped: mmap.mmap, shape: tuple[int, ...], dtype: np.dtype, layout: ShardLayout, rel_offset: int
) -> np.ndarray:
    """A strided array over the map: axis 0 steps from sample to sample, the others are C-ordered."""
    inner = np.empty(shape[1:], dtype=dtype).strides
    offset = layout.first_offset + rel_offset
    return np.ndarray(shape, dtype=dtype, buffer=mapped, offset=offset, strides=(layout.stride, *inner))


def _text(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A column range of uint8 [N, width] as bytes strings [N], trailing zeros off."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(f"S{stop - start}").reshape(-1)


def _octal(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A zero-padded octal column range as int64 [N]; characters that are no octal digit give -1."""
    digits = blocks[:, start:stop].astype(np.int64) - ord("0")
    powers = 8 ** np.arange(stop - start - 1, -1, -1, dtype=np.int64)
    return np.where(((digits < 0) | (digits > 7)).any(axis=1), -1, digits @ powers)
