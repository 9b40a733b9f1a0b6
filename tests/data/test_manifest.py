import json

import pytest

from ecar_dist.data.manifest import MANIFEST_NAME, load_image_manifest, load_manifest
from ecar_dist.errors import DataError
from tests.data.latent_sets import write_set
from tests.data.object_store import object_store, s3_server

__all__ = ["object_store", "s3_server"]


def test_round_trip_and_identity(tmp_path):
    write_set(tmp_path)
    manifest = load_manifest(tmp_path)
    assert manifest == load_manifest(f"file://{tmp_path}")
    tree = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert tree["schema"] == "ecar-latents-v1"
    assert tree["dataset_id"] == manifest.dataset_id
    assert tree["shards"][2] == {**tree["shards"][2], "name": "000002.tar", "count": 17, "first_index": 80}


def test_missing_names_the_fix(tmp_path):
    with pytest.raises(DataError, match=r"manifest.json does not exist.*ecar-data finalize"):
        load_manifest(tmp_path)


def test_missing_behind_a_url_keeps_the_stores_reason(object_store):
    with pytest.raises(DataError, match=r"no such object; check the URL, or send the set there with `ecar-data push`$"):
        load_manifest(f"{object_store.url}/set")
    with pytest.raises(DataError, match=r"s3://nobucket.*NoSuchBucket .*; check the URL, or send the set there"):
        load_image_manifest("s3://nobucket/set")


def test_a_url_that_lost_a_slash():
    with pytest.raises(DataError, match=r"does not exist; did you mean s3://bucket/set/manifest.json\?"):
        load_image_manifest("s3:/bucket/set")


def test_wrong_schema_names_both(tmp_path):
    write_set(tmp_path)
    with pytest.raises(DataError, match="has schema ecar-latents-v1, expected ecar-images-v1"):
        load_image_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"schema": "ecar-latents-v1"}'])
def test_damage_is_one_line(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_edit_by_hand_is_noticed(tmp_path):
    write_set(tmp_path)
    path = tmp_path / MANIFEST_NAME
    path.write_text(path.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    with pytest.raises(DataError, match="was changed"):
        load_manifest(tmp_path)
