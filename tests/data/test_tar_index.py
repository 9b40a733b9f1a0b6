import io
import tarfile

import pytest

from ecar_dist.data.tar_index import index_tar, split_name
from ecar_dist.errors import DataError


def make_tar(path, sizes=(10, 600, 0), *, format=tarfile.USTAR_FORMAT, prefix="m"):
    with tarfile.open(path, "w", format=format) as tar:
        for place, size in enumerate(sizes):
            header = tarfile.TarInfo(f"{prefix}{place}.bin")
            header.size = size
            tar.addfile(header, io.BytesIO(bytes([place + 1]) * size))
    return path


def test_agrees_with_tarfile(tmp_path):
    path = make_tar(tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(member.name, member.offset, member.size) for member in index_tar(path)] == expected


# Offsets in make_tar's file: headers at 0, 1024, 2560; payloads at 512 and 1536; end blocks from 3072 on.
def cut(at):
    return lambda data: data[:at]


def poke(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def blank(at):
    return lambda data: data[:at] + bytes(512) + data[at + 512 :]


DAMAGES = {
    "cut on a member boundary": (cut(1024), "no valid tar header at byte 1024"),
    "cut inside a header": (cut(1100), "no valid tar header at byte 1024"),
    "cut inside a payload": (cut(1600), "runs past the end"),
    "one flipped header byte": (poke(1030), "no valid tar header at byte 1024"),
    "a zeroed header": (blank(1024), "zeroed header at byte 1024"),
    "no end blocks": (cut(3072), "no valid tar header at byte 3072"),
    "one end block": (cut(3584), "zeroed header at byte 3072"),
    "empty": (cut(0), "no valid tar header at byte 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_that_tarfile_passes_over_is_an_error(tmp_path, name):
    damage, message = DAMAGES[name]
    path = make_tar(tmp_path / "a.tar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        index_tar(path)
    assert str(path) in str(caught.value)


def test_foreign_dialects_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", format=tarfile.GNU_FORMAT, prefix="x" * 120)
    with pytest.raises(DataError, match="only plain USTAR"):
        index_tar(path)


@pytest.mark.parametrize(
    ("name", "parts"), [("a/b.c/d.x.npy", ("a/b.c/d", "x.npy")), (".ecar.json", ("", "ecar.json")), ("a", ("a", ""))]
)
def test_split_name(name, parts):
    assert split_name(name) == parts
