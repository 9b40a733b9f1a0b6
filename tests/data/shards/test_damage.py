import mmap
import os
import tarfile

import pytest

from ecar_dist.data.shards.proof import describe_damage, first_damage
from tests.data.latent_sets import write_set

STRIDE = 2048  # header, block of npy, header, block of label


@pytest.fixture
def shard(tmp_path):
    write_set(tmp_path)
    return tmp_path / "000000.tar"


def damage(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return first_damage(mapped), describe_damage(mapped)


def change(path, at, new=None):
    data = bytearray(path.read_bytes())
    data[at : at + len(new or b"x")] = new or bytes([data[at] ^ 1])
    path.write_bytes(data)


def test_a_whole_shard_has_none(shard):
    offset, described = damage(shard)
    assert offset is None
    assert "unknown" in described


@pytest.mark.parametrize(
    ("at", "new", "found"),
    [
        (7 * STRIDE + 3, None, 7 * STRIDE),  # name of a header
        (7 * STRIDE + 1024 + 3, None, 7 * STRIDE + 1024),  # header of the label
        (7 * STRIDE + 512 + 150, None, 7 * STRIDE),  # a moment: its sample
        (39 * STRIDE + 1536, None, 39 * STRIDE),  # the last label
        (5 * STRIDE, bytes(512), 5 * STRIDE),  # a zeroed header ends the archive for tar
        (3 * STRIDE + 600, bytes(20 * STRIDE), 3 * STRIDE),
        (40 * STRIDE + 5, None, 40 * STRIDE),  # header of the description
        (40 * STRIDE + 512, None, 40 * STRIDE),  # its JSON
        (7 * STRIDE + 1536 + 100, None, None),  # padding: nothing covers it
    ],
)
def test_damage_is_placed(shard, at, new, found):
    change(shard, at, new)
    assert damage(shard)[0] == found
    assert ("unknown" if found is None else f" byte {found}") in damage(shard)[1]


def test_the_first_of_two(shard):
    change(shard, 20 * STRIDE + 3)
    change(shard, 7 * STRIDE + 600)
    assert damage(shard)[0] == 7 * STRIDE


def test_a_cut_shard_ends_in_a_member_that_is_not_whole(shard):
    os.truncate(shard, 9 * STRIDE + 600)
    assert damage(shard)[0] == 9 * STRIDE


def test_other_tars_know_their_headers_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 600)
    with tarfile.open(tmp_path / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "a", "a.png")
        tar.add(tmp_path / "b", "b.png")
    change(tmp_path / "images.tar", 700)
    assert damage(tmp_path / "images.tar")[0] is None
    change(tmp_path / "images.tar", 1536 + 10)
    assert damage(tmp_path / "images.tar")[0] == 1536
