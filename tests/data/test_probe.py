import pytest

from ecar_dist.data.probe import probe_images, probe_latents
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.errors import DataError
from tests.data.latent_sets import write_set


def test_the_beginning_of_a_local_set(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    for place in (str(tmp_path), f"file://{tmp_path}"):
        probe = probe_latents(place, manifest)
        assert (probe.where, probe.nbytes) == (str(tmp_path / "000000.tar"), manifest.shards[0].bytes)
        assert probe.seconds > 0
    (tmp_path / "000000.tar").write_bytes(b"cut")
    with pytest.raises(DataError, match=rf"000000\.tar .*\b3 .* {manifest.shards[0].bytes} "):
        probe_latents(str(tmp_path), manifest)
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(DataError, match=r"000000\.tar .*No such file"):
        probe_latents(str(tmp_path), manifest)


def test_the_beginning_of_a_set_behind_a_url(object_store, tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    url = object_store.put_folder(tmp_path, "set/")
    probe = probe_latents(url, manifest)
    assert probe.nbytes == manifest.shards[0].bytes
    assert probe.where.endswith("000000.tar")


def test_the_beginning_of_images(digits):
    probe = probe_images(str(digits / "images/train"))
    assert probe.nbytes > 16 * 60
    assert probe.where.startswith(str(digits / "images/train"))
