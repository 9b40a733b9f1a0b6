"""A strict index of tar files, and the DALI index file next to them.

Python's tarfile stops without an error at a truncation between members, a truncation inside a header, and a damaged
header. Readers that are built on it then see fewer samples. Here each of these is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write
from ecar_dist.storage.untrusted import is_one_line

# A tar is a sequence of blocks of 512 bytes: for each member a header, then its payload padded to whole blocks.
BLOCK = tarfile.BLOCKSIZE

# Fields of a header: magic with version, and the start of a long name in USTAR.
_MAGIC = slice(257, 265)
_PREFIX = slice(345, 500)
_USTAR_MAGIC = b"ustar\x0000"
_GNU_MAGIC = b"ustar  \0"

# Types of members that are accepted in foreign tars, and names of some others for messages.
_READABLE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE)
_NAMES_OF_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# PAX records that do not change a member's name, size or content.
_HARMLESS_PAX = frozenset({"mtime", "atime", "ctime", "uid", "gid", "uname", "gname"})
_PAX_LIMIT = 1 << 20

# Fixes, for messages: what to do with a damaged tar, and with one that has unsupported features.
_RESTORE = "restore the file or write the shard again"
_REPACK = "extract it and pack it again with `tar --format=ustar`"


@dataclass(frozen=True)
class TarMember:
    name: str
    offset: int  # of the payload, in bytes from the start of the tar
    size: int


class SequentialFile(Protocol):
    """The methods that are needed to read a tar. `seek` is only called to go forward."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> object: ...


def index_tar(path: Path) -> list[TarMember]:
    """All members, in order. Raises DataError if the file is not a complete USTAR archive of regular files."""
    with open(path, "rb") as file:
        return list(tar_members(file, os.fstat(file.fileno()).st_size, str(path)))


def tar_members(file: SequentialFile, end: int, where: str, *, foreign: bool = False) -> Iterator[TarMember]:
    """The members of a tar of `end` bytes, in order and in one pass. At each one, the file position is its payload.

    `foreign` also accepts harmless features of other writers: GNU magic, directories, UTF-8 names, and PAX headers
    with times and owners. Raises DataError for other features and for an incomplete archive.
    """
    at = 0
    after_pax = False
    while (header := _header_at(file, at, where, foreign)) is not None:
        # The payload must end inside the file. A negative size would lead backwards.
        member = TarMember(header.name, at + BLOCK, header.size)
        at = member.offset + padded(member.size)
        if header.size < 0 or at > end:
            raise _damaged(where, f"member {header.name!r} of {header.size} bytes runs past the end at {end}")

        # Directories are skipped. A PAX header describes the member after it.
        if header.isreg():
            yield member
        elif header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_pax(file, member, where)
        after_pax = header.type == tarfile.XHDTYPE
        file.seek(at)

    if after_pax:
        raise _damaged(where, f"the tar ends after a PAX header, before its member, at byte {at}")


def padded(size: int) -> int:
    """Bytes that a payload of `size` bytes occupies in a tar: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member name, split as WebDataset does: at the first dot after the last slash."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :]) if dot >= 0 else (name, "")


def write_dali_index(path: Path, members: Iterable[TarMember]) -> None:
    """Write the `.idx` of a tar, version 1.2: one line per sample, no dotfiles. The same bytes as DALI's wds2idx."""
    # Members with the same key are one sample, even if they do not follow each other.
    samples: dict[str, list[str]] = {}
    for member in members:
        key, extension = split_name(member.name)
        if key and not key.endswith("/"):
            samples.setdefault(key, []).append(f"{extension} {member.offset} {member.size} {member.name}")
    # The first line has the version and the number of samples.
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _header_at(file: SequentialFile, at: int, where: str, foreign: bool) -> tarfile.TarInfo | None:
    """The header at byte `at`; None at the end of the archive. Raises DataError for any other content."""
    # A tar ends with two zeroed blocks, and only zeros may follow them.
    block = file.read(BLOCK)
    if block == bytes(BLOCK):
        if file.read(BLOCK) != bytes(BLOCK) or not _only_zeros(file):
            raise _damaged(where, f"zeroed header at byte {at} before the end of the tar")
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8" if foreign else "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _damaged(where, f"no valid tar header at byte {at} ({error})") from None

    # The index file has one line per sample with the names of its members, so a name must not contain a line break.
    fault = _foreign_fault(header, block) if foreign else _ustar_fault(header, block)
    if not is_one_line(header.name):
        fault = "has a name with characters that are not printable"
    if fault:
        raise DataError(f"{where}: member {header.name!r} at byte {at} {fault}; {_REPACK if foreign else _RESTORE}")
    return header


def _ustar_fault(header: tarfile.TarInfo, block: bytes) -> str | None:
    if header.type != tarfile.REGTYPE or block[_MAGIC] != _USTAR_MAGIC:
        return f"has tar type {header.type!r} and magic {block[_MAGIC]!r}, only regular USTAR files are supported"
    return None


def _foreign_fault(header: tarfile.TarInfo, block: bytes) -> str | None:
    """Why a member of a foreign tar cannot be read exactly; None if it can."""
    if block[_MAGIC] not in (_USTAR_MAGIC, _GNU_MAGIC):
        return f"has magic {block[_MAGIC]!r}, which is neither USTAR nor GNU"
    if header.type not in _READABLE_TYPES:
        return f"is {_NAMES_OF_TYPES.get(header.type, f'of tar type {header.type!r}')}"
    if block[_MAGIC] == _GNU_MAGIC and any(block[_PREFIX]):
        return "has GNU's incremental fields"  # where USTAR has the start of a long name
    if header.isdir() and header.size:
        return f"is a directory of {header.size} bytes"
    return None


def _check_pax(file: SequentialFile, member: TarMember, where: str) -> None:
    """Check that the PAX records are harmless. Each one is `length key=value` and a newline. Raises DataError."""
    if member.size > _PAX_LIMIT:
        raise DataError(f"{where}: PAX header at byte {member.offset} has {member.size} bytes; {_REPACK}")

    rest = file.read(member.size)
    while rest:
        # `length` counts the complete record, including its own digits.
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 7 else 0
        record = rest[:length]
        rest = rest[length:]
        key, equals, _ = record[len(digits) + 1 :].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not equals:
            raise _damaged(where, f"PAX header at byte {member.offset} is malformed")
        if key.decode("utf-8", "replace") not in _HARMLESS_PAX:
            text = key[:40].decode("utf-8", "replace")
            raise DataError(f"{where}: PAX header at byte {member.offset} sets {text!r} of its member; {_REPACK}")


def _only_zeros(file: SequentialFile) -> bool:
    while chunk := file.read(1 << 20):
        if any(chunk):
            return False
    return True


def _damaged(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what}; {_RESTORE}")
