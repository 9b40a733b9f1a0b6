import os
from pathlib import Path

import pytest

from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.proof import (
    ShardDamaged,
    check_presence,
    describe_shard,
    local_folder,
    map_verified,
)
from ecar_dist.errors import DataError
from ecar_dist.storage.hashing import hash_open_file
from tests.data.latent_sets import write_set


@pytest.fixture
def entry(tmp_path):
    write_set(tmp_path)
    return load_manifest(tmp_path).shards[1]


def test_local_folders_and_urls():
    assert local_folder("file:///a/b") == local_folder(Path("/a/b")) == Path("/a/b")
    with pytest.raises(DataError, match="s3://bucket/x"):
        local_folder("s3://bucket/x")


def test_a_whole_shard_is_mapped(tmp_path, entry):
    assert map_verified(tmp_path / entry.name, entry)[:] == (tmp_path / entry.name).read_bytes()


def test_both_ways_of_hashing_agree(tmp_path, entry):
    (tmp_path / "large").write_bytes(os.urandom((1 << 20) + 12345))
    with open(tmp_path / "large", "rb", buffering=0) as file:
        file.seek(100)
        assert hash_open_file(file) == describe_shard(tmp_path / "large", 1, 0).xxh3_128


def test_a_wrong_byte_names_shard_offset_expected_and_got(tmp_path, entry):
    path = tmp_path / entry.name
    data = bytearray(path.read_bytes())
    data[2048 * 11 + 600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardDamaged) as caught:
        map_verified(path, entry)
    text = str(caught.value)
    assert str(path) in text
    assert text.index(describe_shard(path, 1, 0).xxh3_128) < text.index(entry.xxh3_128), "got, then expected"
    assert f" byte {2048 * 11}" in text


def test_a_cut_or_missing_shard(tmp_path, entry):
    path = tmp_path / entry.name
    os.truncate(path, entry.bytes - 512)
    with pytest.raises(ShardDamaged, match=rf"{entry.name} .*\b{entry.bytes - 512} .* {entry.bytes}\b"):
        map_verified(path, entry)
    with pytest.raises(ShardDamaged, match=entry.name):
        check_presence(tmp_path, [entry])
    path.unlink()
    for look in (lambda: map_verified(path, entry), lambda: check_presence(tmp_path, [entry])):
        with pytest.raises(DataError, match=rf"{entry.name} .*No such file"):
            look()


def test_shards_behind_a_url_are_not_requested(entry):
    check_presence("s3://no-such-bucket/set", [entry])
