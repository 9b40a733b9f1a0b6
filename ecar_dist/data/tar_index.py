"""A strict index of tar files, and DALI's index beside them.

Python's tarfile ends quietly at a cut on a member boundary, at a cut inside a header and at a damaged header; every
reader built on it then sees a smaller set. Here each of these is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ecar_dist.data.atomic import atomic_write
from ecar_dist.errors import DataError

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class TarMember:
    name: str
    offset: int  # of the payload, in bytes from the start of the tar
    size: int


def index_tar(path: Path) -> list[TarMember]:
    """All members, in order. Raises DataError for anything but a whole USTAR archive of regular files."""
    members: list[TarMember] = []
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        at = 0
        while (member := _member_at(file, at, end, path)) is not None:
            members.append(member)
            at = member.offset + padded(member.size)
    return members


def padded(size: int) -> int:
    """Bytes that `size` bytes of payload take in a tar."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's split of a member name at the first dot after the last slash: (key, extension)."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :]) if dot >= 0 else (name, "")


def write_dali_index(path: Path, members: Iterable[TarMember]) -> None:
    """The `.idx` of a tar, v1.2, byte for byte what DALI's wds2idx writes: one line a sample, no dotfiles."""
    samples: dict[str, list[str]] = {}
    for member in members:
        key, extension = split_name(member.name)
        if key and not key.endswith("/"):
            samples.setdefault(key, []).append(f"{extension} {member.offset} {member.size} {member.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _member_at(file: BinaryIO, at: int, end: int, path: Path) -> TarMember | None:
    """The member whose header begins at `at`; None at a proper end of the archive."""
    file.seek(at)
    block = file.read(BLOCK)
    if block == bytes(BLOCK):
        if file.read(BLOCK) != bytes(BLOCK) or any(file.read()):
            raise DataError(f"{path}: zeroed header at byte {at} before the end of the tar; {_FIX}")
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid tar header at byte {at} ({error}); {_FIX}") from None
    if header.type != tarfile.REGTYPE:
        raise DataError(
            f"{path}: member {header.name!r} has tar type {header.type!r}, only plain USTAR files fit; {_FIX}"
        )
    if at + BLOCK + padded(header.size) > end:
        raise DataError(f"{path}: member {header.name!r} of {header.size} bytes runs past the end at {end}; {_FIX}")
    return TarMember(header.name, at + BLOCK, header.size)


_FIX = "restore the file or write the shard again"
