import io
import os
import shutil
import subprocess
import tarfile

import pytest

from ecar_dist.data.shards.tar_index import index_tar, split_name, tar_members
from ecar_dist.errors import DataError
from tests.data.image_sets import write_webdataset_tar

needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")


def make_tar(path, sizes=(10, 600, 0), *, format=tarfile.USTAR_FORMAT, prefix="m", mtime=0):
    with tarfile.open(path, "w", format=format) as tar:
        for place, size in enumerate(sizes):
            header = tarfile.TarInfo(f"{prefix}{place}.bin")
            header.size, header.mtime = size, mtime
            tar.addfile(header, io.BytesIO(bytes([place + 1]) * size))
    return path


def foreign(path):
    with open(path, "rb") as file:
        return list(tar_members(file, os.path.getsize(path), str(path), foreign=True))


def as_tarfile_sees(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def triples(members):
    return [(member.name, member.offset, member.size) for member in members]


def test_agrees_with_tarfile(tmp_path):
    path = make_tar(tmp_path / "a.tar")
    assert triples(index_tar(path)) == as_tarfile_sees(path)


# Offsets in make_tar's file: headers at 0, 1024, 2560; payloads at 512 and 1536; end blocks from 3072 on.
def cut(at):
    return lambda data: data[:at]


def poke(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def blank(at):
    return lambda data: data[:at] + bytes(512) + data[at + 512 :]


# name -> (damage, our message, members that tarfile still sees, or None if it raises)
DAMAGES = {
    "cut on a member boundary": (cut(1024), "header at byte 1024", 1),
    "cut inside a header": (cut(1100), "header at byte 1024", 1),
    "cut inside a payload": (cut(1600), "past the end", None),
    "one flipped header byte": (poke(1030), "header at byte 1024", 1),
    "a zeroed header": (blank(1024), "zeroed header at byte 1024", 1),
    "no end blocks": (cut(3072), "header at byte 3072", 3),
    "one end block": (cut(3584), "zeroed header at byte 3072", 3),
    "empty": (cut(0), "header at byte 0", None),
    "something after the end": (lambda data: data + b"x", "zeroed header at byte 3072", 3),
}


@pytest.mark.parametrize("read", [index_tar, foreign])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_that_tarfile_passes_over_is_an_error(tmp_path, name, read):
    damage, message, seen = DAMAGES[name]
    path = make_tar(tmp_path / "a.tar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    if seen is None:
        with pytest.raises(tarfile.TarError):
            as_tarfile_sees(path)
    else:
        assert len(as_tarfile_sees(path)) == seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": tarfile.GNU_FORMAT, "prefix": "x" * 120}, "USTAR"),
        ({"format": tarfile.GNU_FORMAT}, "USTAR"),
        ({"format": tarfile.PAX_FORMAT, "mtime": 0.5}, "USTAR"),
        ({"prefix": "é"}, "header at byte 0"),
    ],
)
def test_our_own_shards_are_ustar_and_nothing_else(tmp_path, settings, message):
    path = make_tar(tmp_path / "a.tar", **settings)
    with pytest.raises(DataError, match=message):
        index_tar(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"format": tarfile.USTAR_FORMAT},
        {"format": tarfile.USTAR_FORMAT, "prefix": "d" * 90 + "/" + "x" * 60},  # name and prefix field
        {"format": tarfile.GNU_FORMAT, "mtime": 1.5},
        {"format": tarfile.GNU_FORMAT, "prefix": "é"},
        {"format": tarfile.PAX_FORMAT},
        {"format": tarfile.PAX_FORMAT, "mtime": 1234567890.123},  # a PAX header before every member
    ],
    ids=str,
)
def test_foreign_dialects_that_can_be_read_exactly(tmp_path, settings):
    path = make_tar(tmp_path / "a.tar", **settings)
    assert triples(foreign(path)) == as_tarfile_sees(path)
    assert len(foreign(path)) == 3


def test_tars_of_webdatasets_own_writer(tmp_path):
    path = write_webdataset_tar(tmp_path / "a.tar", [("k0", b"x" * 700, 3), ("k1", b"y", 4)])
    assert path.read_bytes()[156:157] == tarfile.XHDTYPE, "its writer asks for no format, so python's PAX it is"
    assert triples(foreign(path)) == as_tarfile_sees(path)
    assert [member.name for member in foreign(path)] == ["k0.cls", "k0.jpg", "k1.cls", "k1.jpg"]


@needs_tar
@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "posix"])
def test_tars_of_the_tar_program(tmp_path, format):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "a.cls", "deep/b.jpg"):
        (folder / name).write_bytes(name.encode() * 100)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={format}", "-cf", path, "-C", folder, "."], check=True)
    assert triples(foreign(path)) == as_tarfile_sees(path)
    assert {member.name for member in foreign(path)} == {"./a.jpg", "./a.cls", "./deep/b.jpg"}


def special(kind, **values):
    def write(path):
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            header = tarfile.TarInfo("odd")
            header.type = kind
            for name, value in values.items():
                setattr(header, name, value)
            tar.addfile(header)

    return write


def pax_with(**records):
    def write(path):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
            tar.addfile(tarfile.TarInfo("a"))

    return write


def raw_header(change):
    """A tar of one empty file whose header was edited by `change`, with a matching checksum."""

    def write(path):
        make_tar(path, sizes=(0,))
        data = bytearray(path.read_bytes())
        change(data)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        path.write_bytes(data)

    return write


def put(at, value):
    def change(data):
        data[at : at + len(value)] = value

    return raw_header(change)


def directory_with_bytes(data):
    data[156:157] = b"5"
    data[124:136] = b"%011o\0" % 512


REFUSED = {
    "GNU long name": (lambda path: make_tar(path, format=tarfile.GNU_FORMAT, prefix="x" * 120), "GNU long name"),
    "PAX long name": (lambda path: make_tar(path, format=tarfile.PAX_FORMAT, prefix="x" * 160), "'path'"),
    "PAX name that is not ASCII": (lambda path: make_tar(path, format=tarfile.PAX_FORMAT, prefix="é"), "'path'"),
    "PAX size": (pax_with(size="12"), "'size'"),
    "PAX sparse": (pax_with(**{"GNU.sparse.major": "1"}), "'GNU.sparse.major'"),
    "hard link": (special(tarfile.LNKTYPE, linkname="x"), "hard link"),
    "symbolic link": (special(tarfile.SYMTYPE, linkname="x"), "symbolic link"),
    "GNU long link": (special(tarfile.SYMTYPE, linkname="x" * 120), "GNU long link"),
    "device": (special(tarfile.CHRTYPE), "b'3'"),
    "sparse": (put(156, b"S"), "sparse"),
    "old tar without magic": (put(257, bytes(8)), "USTAR.*GNU"),
    "GNU incremental": (put(257, b"ustar  \0" + bytes(80) + b"1"), "incremental"),
    "size below zero": (put(124, b"\xff" * 12), "past the end"),
    "directory with bytes": (raw_header(directory_with_bytes), "directory.* 512 bytes"),
    "Latin-1 name": (put(0, "é".encode("latin-1")), "header at byte 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_tars_that_cannot_be_read_exactly_are_refused(tmp_path, name):
    write, message = REFUSED[name]
    path = tmp_path / "a.tar"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        foreign(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_tar
def test_a_sparse_file_of_the_tar_program_is_refused(tmp_path):
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    for format, message in (("gnu", "sparse"), ("posix", "'GNU.sparse")):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", f"--format={format}", "-S", "-cf", path, "-C", tmp_path, "holes.jpg"], check=True)
        with pytest.raises(DataError, match=message):
            foreign(path)


@pytest.mark.parametrize("records", [b"x", b"5 a=b", b"99 mtime=1\n", b"0 mtime=1\n", b"11 mtime 11\n"])
def test_malformed_pax_records(tmp_path, records):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DataError, match="PAX header at byte 512 "):
        foreign(path)


def test_a_pax_header_needs_its_member(tmp_path):
    record = b"11 mtime=1\n"
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DataError, match=r"PAX header.* byte 1024"):
        foreign(path)


@pytest.mark.parametrize(
    ("name", "parts"), [("a/b.c/d.x.npy", ("a/b.c/d", "x.npy")), (".ecar.json", ("", "ecar.json")), ("a", ("a", ""))]
)
def test_split_name(name, parts):
    assert split_name(name) == parts
