"""The layout of a latent shard: fixed-size members, so that a whole tar is one strided array.

Per sample, key = 12-digit global row: `<key>.latent.npy`, optionally `<key>.latent_flip.npy`, `<key>.cls`. The last
member is `.ecar.json`; a dotfile at the root is what webdataset and DALI both leave out.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ecar_dist.data.shards.tar_index import BLOCK, padded
from ecar_dist.storage.untrusted import Record

DESCRIPTION_NAME = ".ecar.json"
LABEL_EXTENSION = "cls"
LABEL_BYTES = 20  # at most, as int64 in ASCII; the rest of the label's block is zero
MOMENTS_DTYPE = np.dtype("<f2")
MAX_MEMBERS = 8  # of a sample
Offset = Annotated[int, Field(ge=0, le=1 << 53)]


@dataclass(frozen=True)
class Member:
    """One part of each sample. `rel_offset` counts from the sample's first header to the part's payload."""

    ext: str
    rel_offset: int
    nbytes: int | None  # None: varies, but never more than one block
    npy_header_len: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardLayout:
    """`count` samples of `stride` bytes each, the first header at `first_offset`."""

    count: int
    first_offset: int
    stride: int
    members: tuple[Member, ...]

    @staticmethod
    def of(count: int, moments_shape: tuple[int, ...], has_flip: bool) -> ShardLayout:
        header, nbytes = len(npy_header(moments_shape)), math.prod(moments_shape) * MOMENTS_DTYPE.itemsize
        extensions = ("latent.npy", "latent_flip.npy") if has_flip else ("latent.npy",)
        members, at = [], 0
        for extension in extensions:
            members.append(Member(extension, at + BLOCK, header + nbytes, header, MOMENTS_DTYPE.str, moments_shape))
            at += BLOCK + padded(header + nbytes)
        members.append(Member(LABEL_EXTENSION, at + BLOCK, None, 0, "ascii", ()))
        return ShardLayout(count, 0, at + 2 * BLOCK, tuple(members))

    @property
    def end(self) -> int:
        """Byte at which the description's header begins."""
        return self.first_offset + self.count * self.stride

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class MemberRecord(Record):
    """A `Member`, as `.ecar.json` has it."""

    ext: str
    rel_offset: Offset
    nbytes: Offset | None
    npy_header_len: Offset
    dtype: str
    shape: tuple[Offset, ...]


class LayoutRecord(Record):
    """A `ShardLayout`, as `.ecar.json` has it."""

    count: Offset
    first_offset: Offset
    stride: Offset
    members: Annotated[tuple[MemberRecord, ...], Field(max_length=MAX_MEMBERS)]


class Description(BaseModel):
    """What is read of `.ecar.json`. There is more in it: the encoder, and all that a marker repeats."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    layout: LayoutRecord
    first_row: Offset
    missing: tuple[Offset, ...]
    crc32: str  # base64 of a little-endian uint32 for each sample


def sample_key(sample_index: int) -> str:
    return f"{sample_index:012d}"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The bytes that npy 1.0 puts before an fp16 C-ordered array of this shape."""
    buffer = io.BytesIO()
    described = {"descr": MOMENTS_DTYPE.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
