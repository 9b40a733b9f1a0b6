"""The layout of a latent shard: members of fixed size, so that the complete tar is one strided array.

Each sample has the members `<key>.latent.npy`, optionally `<key>.latent_flip.npy`, and `<key>.cls`, where the key is
the row of the sample in the encode plan, with 12 digits. In bytes, with 512-byte tar headers:

    first_offset + row * stride
    | header | npy header, moments, padding | [ header | the same for the mirrored image ] | header | label, padding |
             ^ rel_offset of latent.npy                                                              ^ rel_offset of cls

The last member is `.ecar.json`. webdataset and DALI skip dotfiles at the root of a tar.
"""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ecar_dist.data.shards.tar_index import BLOCK, padded
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, Record

DESCRIPTION_NAME = ".ecar.json"
MOMENTS_DTYPE = np.dtype("<f2")

# A label is an integer in ASCII: at most 20 bytes for int64. The rest of its block is zero.
LABEL_EXTENSION = "cls"
LABEL_BYTES = 20

# Limits for values that were read from a file.
MAX_MEMBERS = 8
Offset = Annotated[int, Field(ge=0, le=1 << 53)]


@dataclass(frozen=True)
class Member:
    """One member of each sample. `rel_offset` is the distance from the sample's first header to the payload."""

    ext: str
    rel_offset: int
    nbytes: int | None  # None: varies, at most one block
    npy_header_len: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardLayout:
    """`count` samples of `stride` bytes each. The header of the first one is at byte `first_offset`."""

    count: int
    first_offset: int
    stride: int
    members: tuple[Member, ...]

    @staticmethod
    def of(count: int, moments_shape: tuple[int, ...], has_flip: bool) -> ShardLayout:
        """The layout that `shards/write.py` produces."""
        header = len(npy_header(moments_shape))
        nbytes = header + math.prod(moments_shape) * MOMENTS_DTYPE.itemsize

        # One npy file, or two; then a label of one block. `at` is the offset of the next header in the sample.
        members = []
        at = 0
        for extension in ("latent.npy", "latent_flip.npy") if has_flip else ("latent.npy",):
            members.append(Member(extension, at + BLOCK, nbytes, header, MOMENTS_DTYPE.str, moments_shape))
            at += BLOCK + padded(nbytes)
        members.append(Member(LABEL_EXTENSION, at + BLOCK, None, 0, "ascii", ()))
        return ShardLayout(count, 0, at + 2 * BLOCK, tuple(members))

    @property
    def end(self) -> int:
        """Byte offset of the header of `.ecar.json`."""
        return self.first_offset + self.count * self.stride

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# The same types as they are read back from `.ecar.json`. A file may contain anything, so pydantic checks these.


class MemberRecord(Record):
    """A `Member` as read from `.ecar.json`."""

    ext: str
    rel_offset: Offset
    nbytes: Offset | None
    npy_header_len: Offset
    dtype: str
    shape: tuple[Offset, ...]


class LayoutRecord(Record):
    """A `ShardLayout` as read from `.ecar.json`."""

    count: Offset
    first_offset: Offset
    stride: Offset
    # Bounded, because a reader loops over them for every sample.
    members: Annotated[tuple[MemberRecord, ...], Field(max_length=MAX_MEMBERS)]


class Description(BaseModel):
    """The fields of `.ecar.json` that are read back. It also has the encoder and the fields of the commit marker."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    layout: LayoutRecord
    first_row: Offset
    missing: tuple[Offset, ...]

    # base64 of one little-endian uint32 per sample, over the payloads of its members.
    crc32: str


def sample_key(sample_index: int) -> str:
    return f"{sample_index:012d}"


def description_text(tail: bytes) -> bytes:
    """The JSON text of `.ecar.json`, from bytes that begin with its tar header. Raises ValueError if they do not."""
    # The stated size may be wrong, so no more than the limit is copied.
    try:
        header = tarfile.TarInfo.frombuf(tail[:BLOCK], "ascii", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"no tar header: {error}") from None
    if header.name != DESCRIPTION_NAME:
        raise ValueError(f"the last member is {header.name!r}")
    return bytes(tail[BLOCK : BLOCK + min(header.size, MAX_JSON_BYTES)])


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of an npy 1.0 file with an fp16 C-ordered array of this shape."""
    # The header depends on the shape alone, so all samples of a set have the same one.
    buffer = io.BytesIO()
    fields = {"descr": MOMENTS_DTYPE.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
