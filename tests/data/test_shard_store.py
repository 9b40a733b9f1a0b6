import pytest

from ecar_dist.data.manifest import load_manifest
from ecar_dist.data.shard_store import CacheOptions, open_store
from ecar_dist.errors import DataError
from tests.data.latent_sets import write_set


def test_a_local_set_is_mapped_where_it_lies(tmp_path):
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
