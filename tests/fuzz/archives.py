"""Changes inside tars, safetensors files and numpy tables that keep the rest of the file's form."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.fuzz.nasty import FILES, STRINGS, VALUES

if TYPE_CHECKING:
    from tests.fuzz.mutation import Mutation

BLOCK = tarfile.BLOCKSIZE
TAR_OPS = (
    "field",
    "field_raw",
    "type",
    "member_drop",
    "member_twice",
    "member_move",
    "member_name",
    "member_empty",
    "member_content",
    "member_bytes",
    "member_json",
    "npy_header",
    "pax",
    "long_name",
    "no_end",
    "early_end",
    "after_end",
)
TENSOR_OPS = ("header", "header_length", "not_finite", "tensor_zero", "header_bytes")
TABLE_OPS = ("cell", "table_header", "table_bytes")
# name, offset, size
FIELDS = (
    ("name", 0, 100),
    ("mode", 100, 8),
    ("uid", 108, 8),
    ("size", 124, 12),
    ("mtime", 136, 12),
    ("checksum", 148, 8),
    ("type", 156, 1),
    ("linkname", 157, 100),
    ("magic", 257, 8),
    ("uname", 265, 32),
    ("devmajor", 329, 8),
    ("prefix", 345, 155),
)
FIELD_VALUES = (
    b"",
    b"\xff\xff\xff\xff",
    b"-0000000001\0",
    b"77777777777\0",
    b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
    b"00000000000\0",
    b"99999999999\0",
    b" 17 \0",
    b"../../kept\0",
    b"/etc/kept\0",
    b"a\nb\x1b[2J\0",
    b"GNU.sparse.map\0",
    b"000000000000.latent.npy\0",
    b".ecar.json\0",
    b"ustar  \0",
    b"nul\0nul",
)
TYPES = b"\0123456789LKSVxgAX\xff"
NPY_HEADERS = (
    "{'descr': '<f2', 'fortran_order': True, 'shape': (4,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999, 99999999999), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (9,), }",
    "{'descr': [('a', '<f2'), ('a', '<f2')], 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f2', 'fortran_order': False}",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1e9,), }",
    "__import__('os').system('true')",
    "(" * 500,
    "",
    "\xff\xfe",
)


@dataclass
class Member:
    header: bytearray
    payload: bytes

    @property
    def name(self) -> bytes:
        return bytes(self.header[:100]).rstrip(b"\0")

    def seal(self) -> None:
        """Set the size and the checksum that match."""
        self.header[124:136] = b"%011o\0" % len(self.payload)
        self.check()

    def check(self) -> None:
        self.header[148:156] = b" " * 8
        self.header[148:156] = b"%06o\0 " % sum(self.header)

    def encode(self) -> bytes:
        return bytes(self.header) + self.payload + bytes(-len(self.payload) % BLOCK)


def read_tar(content: bytes) -> list[Member]:
    """The members as blocks, with headers of any type. Stops at the first block that is not a header."""
    members, at = [], 0
    while at + BLOCK <= len(content) and any(content[at : at + BLOCK]):
        try:
            size = int(content[at + 124 : at + 135].strip(b"\0 ") or b"0", 8)
        except ValueError:
            break
        payload = content[at + BLOCK : at + BLOCK + size]
        members.append(Member(bytearray(content[at : at + BLOCK]), payload))
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return members


def change_tar(content: bytes, mutation: Mutation, change_json: Callable[[bytes, Mutation], bytes]) -> bytes:
    members = read_tar(content)
    if not members:
        return content
    first, second = (*_numbers(mutation), 0, 0)[:2]
    place = min(int(mutation.at * len(members)), len(members) - 1)
    member, end = members[place], bytes(2 * BLOCK)
    if mutation.op in ("field", "field_raw"):
        _, start, size = FIELDS[first % len(FIELDS)]
        member.header[start : start + size] = FIELD_VALUES[second % len(FIELD_VALUES)][:size].ljust(size, b"\0")
        if mutation.op == "field" and FIELDS[first % len(FIELDS)][0] != "checksum":
            member.check()
    elif mutation.op == "type":
        member.header[156] = TYPES[first % len(TYPES)]
        member.check()
    elif mutation.op == "member_drop":
        del members[place]
    elif mutation.op == "member_twice":
        members.insert(place, member)
    elif mutation.op == "member_move":
        members.insert(first % len(members), members.pop(place))
    elif mutation.op == "member_name":
        name = STRINGS.get(mutation.value, mutation.value).encode("utf-8", "surrogatepass")[:100]
        extension = b"." + member.name.partition(b".")[2] if first % 2 else b""
        member.header[:100] = (name[: 100 - len(extension)] + extension)[:100].ljust(100, b"\0")
        member.check()
    elif mutation.op == "member_empty":
        member.payload = b""
        member.seal()
    elif mutation.op == "member_content":
        values = [*FILES.values(), *(text.encode() for text in VALUES.values())]
        member.payload = values[first % len(values)]
        member.seal()
    elif mutation.op == "member_bytes" and member.payload:
        changed = bytearray(member.payload)
        changed[first * 31 % len(changed)] ^= 1 << second % 8
        member.payload = bytes(changed)
    elif mutation.op == "member_json":
        found = [one for one in members if one.payload[:1] == b"{"]
        if found:
            found[-1].payload = change_json(found[-1].payload, _as_tree_change(mutation))
            found[-1].seal()
    elif mutation.op == "npy_header" and member.payload[:6] == b"\x93NUMPY":
        member.payload = _npy_with_header(member.payload, NPY_HEADERS[first % len(NPY_HEADERS)], keep=second % 2 == 0)
        member.seal()
    elif mutation.op in ("pax", "long_name"):
        members.insert(place, _extension(member, mutation, first))
    elif mutation.op == "no_end":
        end = b""
    elif mutation.op == "early_end":
        members.insert(place, Member(bytearray(BLOCK), b""))
    elif mutation.op == "after_end":
        end += member.encode()
    return b"".join(one.encode() for one in members) + end


def _extension(member: Member, mutation: Mutation, choice: int) -> Member:
    """A PAX or GNU header that describes the member after it."""
    header = bytearray(member.header)
    text = STRINGS.get(mutation.value, mutation.value)[:2000]
    if mutation.op == "long_name":
        header[156] = b"LK"[choice % 2]
        payload = text.encode("utf-8", "surrogatepass") + b"\0"
    else:
        header[156] = b"xg"[choice % 2]
        key = ("path", "size", "mtime", "linkpath", "GNU.sparse.major", "hdrcharset", "uname", text[:20])[choice % 8]
        record = f" {key}={text}\n".encode("utf-8", "surrogatepass")
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length = len(str(length)) + len(record)
        payload = (str(length) if choice % 5 else "99999999").encode() + record
    added = Member(header, payload)
    added.seal()
    return added


def _npy_with_header(payload: bytes, text: str, *, keep: bool) -> bytes:
    """The array with a different header; with `keep`, a header of the same length as before."""
    length = struct.unpack("<H", payload[8:10])[0]
    header = text.encode("latin-1") + b"\n"
    header = header[:length].rjust(length) if keep and len(header) > length else header.rjust(length)
    return payload[:8] + struct.pack("<H", len(header)) + header + payload[10 + length :]


def change_tensors(content: bytes, mutation: Mutation, change_json: Callable[[bytes, Mutation], bytes]) -> bytes:
    """A safetensors file: eight bytes with the header's length, the header in JSON, the values."""
    length = struct.unpack("<Q", content[:8])[0]
    header, values = content[8 : 8 + length], content[8 + length :]
    first, second = (*_numbers(mutation), 0, 0)[:2]
    if mutation.op == "header_length":
        sizes = (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(content))
        return struct.pack("<Q", sizes[first % len(sizes)]) + header + values
    if mutation.op == "header_bytes":
        header = bytearray(header)
        header[first * 17 % len(header)] ^= 1 << second % 8
    elif mutation.op in ("not_finite", "tensor_zero"):
        patch = struct.pack("<f", (float("nan"), float("inf"), -float("inf"), 1e38)[second % 4])
        patch = patch if mutation.op == "not_finite" else bytes(4096)
        at = int(mutation.at * (len(values) - len(patch))) // 4 * 4
        values = values[:at] + patch + values[at + len(patch) :]
    else:
        header = change_json(header, _as_tree_change(mutation))
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + bytes(header) + values


def change_table(content: bytes, mutation: Mutation) -> bytes:
    """The .npy of an image set: a cell, the header, or bytes."""
    first, second = (*_numbers(mutation), 0, 0)[:2]
    if mutation.op == "table_header":
        return _npy_with_header(content, NPY_HEADERS[first % len(NPY_HEADERS)], keep=second % 2 == 0)
    if mutation.op == "table_bytes":
        changed = bytearray(content)
        changed[min(int(mutation.at * len(changed)), len(changed) - 1)] ^= 1 << first % 8
        return bytes(changed)
    try:
        table = np.load(io.BytesIO(content), allow_pickle=False).copy()
        column = table.dtype.names[first % len(table.dtype.names)]
    except (ValueError, TypeError, EOFError, SyntaxError, MemoryError):
        return content
    row = min(int(mutation.at * len(table)), len(table) - 1)
    if column == "key":
        table[row][column] = STRINGS.get(mutation.value, "x").encode("utf-8", "surrogatepass")
    else:
        information = np.iinfo(table.dtype[column])
        table[row][column] = (0, information.max, information.min, 1, information.max // 2)[second % 5]
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def _numbers(mutation: Mutation) -> tuple[int, ...]:
    return tuple(part for part in mutation.where if isinstance(part, int))


def _as_tree_change(mutation: Mutation) -> Mutation:
    """The mutation as a change of a tree. If `op` is not one, it is chosen by `at`."""
    import dataclasses

    from tests.fuzz.mutation import TREE_OPS

    if mutation.op in TREE_OPS:
        return mutation
    return dataclasses.replace(mutation, op=TREE_OPS[int(mutation.at * 997) % len(TREE_OPS)])
