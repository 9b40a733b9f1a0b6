"""Read one latent shard: check its structure once, then view its samples as strided arrays over the mapped tar."""

from __future__ import annotations

import base64
import mmap
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ecar_dist.data.shards.entries import LatentEntry
from ecar_dist.data.shards.layout import (
    DESCRIPTION_NAME,
    LABEL_BYTES,
    MOMENTS_DTYPE,
    Description,
    Member,
    ShardLayout,
    description_text,
    npy_header,
    sample_key,
)
from ecar_dist.data.shards.proof import ProvenMap, map_verified
from ecar_dist.data.shards.tar_index import BLOCK
from ecar_dist.errors import DataError
from ecar_dist.storage.untrusted import parse_json, parse_record

# Fields of a USTAR header: name 0:100, size 124:136, checksum 148:156, type 156, magic and version 257:265.
# They are compared for all samples of a shard at once, as columns of uint8 [count, 512].
_MAGIC = np.frombuffer(b"ustar\x0000", dtype=np.uint8)


class SetFormat(Protocol):
    """What all shards of a set have in common. Both a manifest and the plan of an encoding state it."""

    @property
    def moments_shape(self) -> tuple[int, ...]: ...

    @property
    def has_flip(self) -> bool: ...

    @property
    def num_classes(self) -> int: ...


class LatentShard:
    """A mapped shard with checked structure.

    Attributes, all but `labels` views of the map:
    `moments`   fp16 [count, *shape]
    `mirrored`  the same for the mirrored images; if the set does not store them, it is `moments`
    `labels`    int64 [count]
    `addresses` where moments, mirrored and labels begin in memory, for `gather`

    `mapped` has the bytes that `entry` describes: size and hash were checked by a ShardStore or `open_latent_shard`.
    `where` is the path or URL for messages. Raises DataError that names shard and member if structure, keys or labels
    are not what `entry` and `manifest` state.
    """

    def __init__(self, mapped: mmap.mmap, where: str, entry: LatentEntry, manifest: SetFormat) -> None:
        self.where = where
        self.entry = entry
        self.layout = ShardLayout.of(entry.count, manifest.moments_shape, manifest.has_flip)
        self._mapped = mapped

        # Is there enough data for all samples? Otherwise the views below would not fit into the map.
        keys = np.array([sample_key(row) for row in entry.rows.tolist()], "S12")  # [count]
        if len(keys) != entry.count:
            raise self._wrong(f"has {entry.count} samples by its manifest entry, but {len(keys)} keys")
        if len(self._mapped) < self.layout.end + BLOCK:
            raise self._wrong(f"has room for fewer than {entry.count} samples of {self.layout.stride} bytes")

        # Check all tar headers, then look at the payloads as arrays.
        for member in self.layout.members:
            self._check_headers(member, keys)
        arrays = [member for member in self.layout.members if member.npy_header_len]
        self.moments = self._array_view(arrays[0])
        self.mirrored = self._array_view(arrays[-1])
        self.labels = self._read_labels(manifest.num_classes)
        self.addresses = tuple(view.ctypes.data for view in (self.moments, self.mirrored, self.labels))

    def has_changed(self) -> bool:
        """Whether the file changed since its proof began. Raises DataError if its attributes cannot be read."""
        return isinstance(self._mapped, ProvenMap) and self._mapped.has_changed()

    def is_cut(self) -> bool:
        """Whether the file is now shorter than its map. Reading the missing part would kill the process with SIGBUS."""
        return self._mapped.size() < len(self._mapped)

    def encoded(self, mirrored: bool) -> np.ndarray:
        """The npy files with their headers, for a reader that decodes them: uint8 [count, nbytes], a view."""
        arrays = [member for member in self.layout.members if member.npy_header_len]
        # Without stored mirrored images, both are the same member.
        member = arrays[-1 if mirrored else 0]
        return self._strided(member.rel_offset, member.npy_header_len + self.moments[0].nbytes)

    def description(self) -> dict[str, Any]:
        """The content of `.ecar.json`: layout, keys, CRCs, encoder, plan id."""
        try:
            return parse_description(self._mapped[self.layout.end :])
        except ValueError as error:
            raise self._wrong(f"does not end with a complete {DESCRIPTION_NAME} ({error})") from None

    def check_samples(self) -> None:
        """Read every sample. Raises DataError for a wrong CRC-32, and for moments that are not finite."""
        try:
            sums = np.frombuffer(base64.b64decode(self.description()["crc32"]), dtype="<u4")
        except (KeyError, TypeError, ValueError) as error:
            raise self._wrong(f"has no readable CRC-32 list ({error})") from None
        if len(sums) != self.entry.count:
            raise self._wrong(f"lists {len(sums)} CRC-32 sums for {self.entry.count} samples")

        # The writer computed each sum before the tar existed, so this also finds errors in the writing itself.
        for row in range(self.entry.count):
            if zlib.crc32(self.sample_bytes(row)) != sums[row]:
                raise self._wrong(f"has a wrong CRC-32 at key {self._key(row)}")
        if not (np.isfinite(self.moments).all() and np.isfinite(self.mirrored).all()):
            raise self._wrong("has moments that are not finite")

    def sample_bytes(self, row: int) -> bytes:
        """The payloads of one sample laid end to end, which its CRC-32 covers."""
        # The size of a label varies, and only its text shows it: trailing zeros are padding.
        start = self.layout.first_offset + row * self.layout.stride
        parts = []
        for member in self.layout.members:
            at = start + member.rel_offset
            parts.append(self._mapped[at : at + member.nbytes] if member.nbytes else self._label_text(row))
        return b"".join(parts)

    def _label_text(self, row: int) -> bytes:
        return bytes(self._strided(self.layout.members[-1].rel_offset, LABEL_BYTES)[row]).rstrip(b"\0")

    def _strided(self, rel_offset: int, width: int) -> np.ndarray:
        """`width` bytes of every sample, at the same offset: uint8 [count, width]."""
        return _view(self._mapped, (self.layout.count, width), np.dtype(np.uint8), self.layout, rel_offset)

    def _array_view(self, member: Member) -> np.ndarray:
        """The arrays of an npy member: fp16 [count, *shape]. Raises DataError for any other npy header."""
        # All samples have the same npy header, because they have the same shape and dtype.
        headers = self._strided(member.rel_offset, member.npy_header_len)
        if (headers != np.frombuffer(npy_header(member.shape), dtype=np.uint8)).any():
            raise self._wrong(f"has a {member.ext} that is not npy 1.0 fp16 {list(member.shape)}")
        shape = (self.layout.count, *member.shape)
        return _view(self._mapped, shape, MOMENTS_DTYPE, self.layout, member.rel_offset + member.npy_header_len)

    def _check_headers(self, member: Member, keys: np.ndarray) -> None:
        """Check the tar headers of one member of all samples at once: names, sizes, checksums, types."""
        headers = self._strided(member.rel_offset - BLOCK, BLOCK)
        wanted = np.char.add(keys, f".{member.ext}".encode())

        # The checksum is the sum of all bytes of the header, with its own field read as spaces.
        sums = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")

        # For each field, the samples in which it is wrong: bool [count].
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
        """The labels as int64 [count]. Raises DataError for one that is not in [0, num_classes)."""
        texts = _text(self._strided(self.layout.members[-1].rel_offset, LABEL_BYTES), 0, LABEL_BYTES)
        # numpy parses all labels at once.
        try:
            labels = texts.astype(np.int64)
        except ValueError as error:
            raise self._wrong(f"has a label that is not a number ({error})") from None
        outside = (labels < 0) | (labels >= num_classes)
        if outside.any():
            row = int(outside.argmax())
            raise self._wrong(f"has label {labels[row]} at key {self._key(row)}, labels are 0..{num_classes - 1}")
        return labels

    def _key(self, row: int) -> str:
        return sample_key(int(self.entry.rows[row]))

    def _wrong(self, what: str) -> DataError:
        return DataError(f"shard {self.where} {what}; write it again with `ecar-data encode`, or restore the file")


def parse_description(tail: bytes) -> dict[str, Any]:
    """The JSON object in `.ecar.json`, from the last bytes of a shard, which begin with this member's header.

    Raises ValueError if it is not a complete `.ecar.json`.
    """
    # The record checks the fields that are used here. The object has more fields.
    text = description_text(tail)
    parse_record(text, Description)
    tree: dict[str, Any] = parse_json(text)
    return tree


def open_latent_shard(path: Path, entry: LatentEntry, manifest: SetFormat) -> LatentShard:
    """Open a local shard and check its size and hash. Raises DataError that names the shard for any difference."""
    return LatentShard(map_verified(path, entry), str(path), entry, manifest)


def _view(
    mapped: mmap.mmap, shape: tuple[int, ...], dtype: np.dtype, layout: ShardLayout, rel_offset: int
) -> np.ndarray:
    """A strided array over the map: axis 0 steps from sample to sample, the other axes are C-ordered."""
    # The strides within one C-ordered sample. From one sample to the next, it is the stride of the layout.
    inner = np.empty(shape[1:], dtype=dtype).strides
    offset = layout.first_offset + rel_offset
    return np.ndarray(shape, dtype=dtype, buffer=mapped, offset=offset, strides=(layout.stride, *inner))


def _text(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A range of columns of uint8 [N, width] as byte strings [N] without trailing zeros."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(f"S{stop - start}").reshape(-1)


def _octal(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A range of columns with zero-padded octal digits as int64 [N]; -1 where a character is not an octal digit."""
    # Characters minus "0" are digits; the last column is the lowest power of 8.
    digits = blocks[:, start:stop].astype(np.int64) - ord("0")
    powers = 8 ** np.arange(stop - start - 1, -1, -1, dtype=np.int64)
    return np.where(((digits < 0) | (digits > 7)).any(axis=1), -1, digits @ powers)
