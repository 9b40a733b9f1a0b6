"""A strict index of tar files, and DALI's index beside them.

Python's tarfile ends quietly at a cut on a member boundary, at a cut inside a header and at a damaged header; every
reader built on it then sees a smaller set. Here each of these is an error.
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

BLOCK = tarfile.BLOCKSIZE

_USTAR_MAGIC, _GNU_MAGIC = b"ustar\x0000", b"ustar  \0"
_MAGIC, _PREFIX = slice(257, 265), slice(345, 500)  # fields of a header
_READABLE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE)
_NAMES_OF_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# What PAX may say of a member without changing its name, its size or its bytes.
_HARMLESS_PAX = frozenset({"mtime", "atime", "ctime", "uid", "gid", "uname", "gname"})
_PAX_LIMIT = 1 << 20
_RESTORE = "restore the file or write the shard again"
_REPACK = "extract it and pack it again with `tar --format=ustar`"


@dataclass(frozen=True)
class TarMember:
    name: str
    offset: int  # of the payload, in bytes from the start of the tar
    size: int


class SequentialFile(Protocol):
    """All that reading a tar needs; `seek` goes forward only."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> object: ...


def index_tar(path: Path) -> list[TarMember]:
    """All members, in order. Raises DataError for anything but a whole USTAR archive of regular files."""
    with open(path, "rb") as file:
        return list(tar_members(file, os.fstat(file.fileno()).st_size, str(path)))


def tar_members(file: SequentialFile, end: int, where: str, *, foreign: bool = False) -> Iterator[TarMember]:
    """The members of a tar of `end` bytes, in order, from one pass: the file stands at the payload of each.

    `foreign` also takes what other writers add and what cannot mislead: GNU magic, directories, UTF-8 names, PAX
    headers of times and owners. Raises DataError for all else, and for whatever is not a whole archive.
    """
    at, after_pax = 0, False
    while (header := _header_at(file, at, where, foreign)) is not None:
        member = TarMember(header.name, at + BLOCK, header.size)
        at = member.offset + padded(member.size)
        if header.size < 0 or at > end:
            raise _damaged(where, f"member {header.name!r} of {header.size} bytes runs past the end at {end}")
        if header.isreg():
            yield member
        elif header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_pax(file, member, where)
        after_pax = header.type == tarfile.XHDTYPE
        file.seek(at)
    if after_pax:
        raise _damaged(where, f"the tar ends after a PAX header, before its member, at byte {at}")


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


def _header_at(file: SequentialFile, at: int, where: str, foreign: bool) -> tarfile.TarInfo | None:
    """The header at byte `at`, of a kind that may stand there; None at a proper end of the archive."""
    block = file.read(BLOCK)
    if block == bytes(BLOCK):
        if file.read(BLOCK) != bytes(BLOCK) or not _only_zeros(file):
            raise _damaged(where, f"zeroed header at byte {at} before the end of the tar")
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8" if foreign else "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _damaged(where, f"no valid tar header at byte {at} ({error})") from None
    fault = _dialect_fault(header, block) if foreign else _ustar_fault(header, block)
    if not is_one_line(header.name):  # the index beside the tar has a line for each member, with its name
        fault = "has a name with characters that are not printable"
    if fault:
        raise DataError(f"{where}: member {header.name!r} at byte {at} {fault}; {_REPACK if foreign else _RESTORE}")
    return header


def _ustar_fault(header: tarfile.TarInfo, block: bytes) -> str | None:
    if header.type != tarfile.REGTYPE or block[_MAGIC] != _USTAR_MAGIC:
        return f"has tar type {header.type!r} and magic {block[_MAGIC]!r}, only plain USTAR files fit"
    return None


def _dialect_fault(header: tarfile.TarInfo, block: bytes) -> str | None:
    """Why a foreign member cannot be read exactly; None where it can."""
    if block[_MAGIC] not in (_USTAR_MAGIC, _GNU_MAGIC):
        return f"has magic {block[_MAGIC]!r}, neither USTAR nor GNU"
    if header.type not in _READABLE_TYPES:
        return f"is {_NAMES_OF_TYPES.get(header.type, f'of tar type {header.type!r}')}"
    if block[_MAGIC] == _GNU_MAGIC and any(block[_PREFIX]):
        return "has GNU's incremental fields"  # where USTAR keeps the start of a long name
    if header.isdir() and header.size:
        return f"is a directory of {header.size} bytes"
    return None


def _check_pax(file: SequentialFile, member: TarMember, where: str) -> None:
    """Raises DataError unless the PAX records, `length key=value` and a newline each, are harmless."""
    if member.size > _PAX_LIMIT:
        raise DataError(f"{where}: PAX header at byte {member.offset} has {member.size} bytes; {_REPACK}")
    rest = file.read(member.size)
    while rest:
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 7 else 0
        record, rest = rest[:length], rest[length:]
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
