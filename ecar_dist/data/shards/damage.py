"""Where a shard whose hash is wrong was damaged, as far as the shard itself can tell.

The hash of the whole file says that something is wrong; tar headers carry checksums, and a latent shard's `.ecar.json`
a CRC-32 of each sample, so most damage can be placed. Nothing here is needed to notice it.
"""

from __future__ import annotations

import base64
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from ecar_dist.data.shards.layout import DESCRIPTION_NAME, Description, MemberRecord
from ecar_dist.data.shards.tar_index import BLOCK, padded
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, parse_record


def describe_damage(mapped: mmap.mmap) -> str:
    """For a message: where the damage is, or that nobody can tell."""
    offset = first_damage(mapped)
    return "at an unknown offset" if offset is None else f"the first damage is at or after byte {offset}"


def first_damage(mapped: mmap.mmap) -> int | None:
    """Start of the first header, sample or description that is known to be wrong; None where all that is known agrees.

    Headers are located to their block, payloads to their sample.
    """
    headers = _first_bad_header(mapped)
    found = mapped.rfind(DESCRIPTION_NAME.encode() + b"\0")
    samples = None
    if found >= 0 and found % BLOCK == 0:
        try:
            samples = _first_bad_sample(mapped, _description(mapped, found))
        except (ValueError, tarfile.HeaderError):
            samples = found
    return min((offset for offset in (headers, samples) if offset is not None), default=None)


def _first_bad_header(mapped: mmap.mmap) -> int | None:
    """Walk the archive from header to header; the first place where no valid one begins."""
    at = 0
    while at + BLOCK <= len(mapped):
        block = mapped[at : at + BLOCK]
        if not any(block):
            return at if any(mapped[at:]) else None  # zeros to the last byte are the end
        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            return at
        if size < 0 or at + BLOCK + size > len(mapped):
            return at
        at += BLOCK + padded(size)
    return None


def _description(mapped: mmap.mmap, at: int) -> Description:
    member = tarfile.TarInfo.frombuf(mapped[at : at + BLOCK], "ascii", "strict")
    return parse_record(mapped[at + BLOCK : at + BLOCK + min(member.size, MAX_JSON_BYTES)], Description)


def _first_bad_sample(mapped: mmap.mmap, description: Description) -> int | None:
    """By the layout and the CRC-32 of each sample's payloads that its writer stated."""
    layout = description.layout
    sums = np.frombuffer(base64.b64decode(description.crc32), dtype="<u4").tolist()
    for row, expected in enumerate(sums):
        start = layout.first_offset + row * layout.stride
        if zlib.crc32(b"".join(_payloads(mapped, start, layout.members))) != expected:
            return start
    return None


def _payloads(mapped: mmap.mmap, start: int, members: Sequence[MemberRecord]) -> Iterator[bytes]:
    for member in members:
        at = start + member.rel_offset
        # a label's size varies and only its header knows it
        size = member.nbytes
        yield mapped[at : at + (size if size is not None else _stated_size(mapped, at - BLOCK))]


def _stated_size(mapped: mmap.mmap, header: int) -> int:
    return int(mapped[header + 124 : header + 135].rstrip(b"\0 ") or b"0", 8)
