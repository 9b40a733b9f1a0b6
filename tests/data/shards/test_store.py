import threading

import pytest

from ecar_dist.data.shards import store as shard_store
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.store import CacheOptions, open_store
from ecar_dist.errors import DataError
from tests.data.latent_sets import write_set
from tests.data.process import open_files, wait_until
from tests.data.shards.test_read import flip_a_byte


def test_a_local_set_is_mapped_in_place(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    store = open_store(f"file://{tmp_path}", manifest.dataset_id, manifest.shards, CacheOptions(root=tmp_path / "c"))
    store.prefetch([0, 1])
    store.retire({})
    for index, entry in enumerate(manifest.shards):
        assert store.where(index) == str(tmp_path / entry.name)
        assert store.open(index)[:] == (tmp_path / entry.name).read_bytes()
    assert not (tmp_path / "c").exists()
    store.close()


def test_a_local_set_is_whole_or_refused(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    (tmp_path / "000002.tar").unlink()
    with pytest.raises(DataError, match=r"000002\.tar"):
        open_store(tmp_path, manifest.dataset_id, manifest.shards, CacheOptions())


def test_prefetched_shards_are_proven_once_and_errors_are_raised_by_open(tmp_path, monkeypatch):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    flip_a_byte(tmp_path / "000001.tar")
    proven = []
    real = shard_store.map_verified
    monkeypatch.setattr(
        shard_store, "map_verified", lambda path, entry: (proven.append(path.name), real(path, entry))[1]
    )
    store = open_store(tmp_path, manifest.dataset_id, manifest.shards, CacheOptions())
    store.prefetch([2, 1])
    store.prefetch([1, 2])
    wait_until(lambda: len(proven) == 2)
    assert sorted(proven) == ["000001.tar", "000002.tar"]
    assert store.open(2)[:] == (tmp_path / "000002.tar").read_bytes()
    with pytest.raises(DataError, match=r"000001\.tar"):
        store.open(1)
    assert sorted(proven) == ["000001.tar", "000002.tar"]
    store.close()
    store.prefetch([0])
    assert store.open(0)[:] == (tmp_path / "000000.tar").read_bytes()


def test_shards_that_are_no_longer_requested_are_closed(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    store = open_store(tmp_path, manifest.dataset_id, manifest.shards, CacheOptions())
    store.prefetch([0, 1])
    store.prefetch([1, 2])
    wait_until(lambda: open_files(tmp_path) == {"000001.tar", "000002.tar"})
    assert store.open(0)[:] == (tmp_path / "000000.tar").read_bytes()
    store.close()


def test_the_structure_of_a_local_shard_is_checked_in_the_background(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    threads = []

    def opened(mapped, where, entry):
        assert where.endswith(entry.name)
        threads.append((manifest.shards.index(entry), threading.current_thread().name))
        return len(mapped)

    store = open_store(tmp_path, manifest.dataset_id, manifest.shards, CacheOptions(), opened)
    store.prefetch([1])
    wait_until(lambda: len(threads) == 1)
    assert [store.open(1), store.open(0)] == [manifest.shards[1].bytes, manifest.shards[0].bytes]
    assert threads == [(1, "shard-prove"), (0, "MainThread")]
    store.close()
