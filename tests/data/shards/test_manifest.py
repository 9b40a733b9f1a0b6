import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.inspection import stats, verify
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_image_manifest, load_manifest, write_manifest
from ecar_dist.errors import DataError, EcarError
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
    with pytest.raises(DataError, match=r"manifest\.json .*`ecar-data finalize"):
        load_manifest(tmp_path)


def test_missing_behind_a_url_keeps_the_stores_reason(object_store):
    with pytest.raises(DataError, match=r"no such object.*`ecar-data push`"):
        load_manifest(f"{object_store.url}/set")
    with pytest.raises(DataError, match=r"s3://nobucket.*NoSuchBucket .*`ecar-data push`"):
        load_image_manifest("s3://nobucket/set")


def test_a_url_that_lost_a_slash():
    with pytest.raises(DataError, match=r" s3://bucket/set/manifest\.json\?"):
        load_image_manifest("s3:/bucket/set")


def test_wrong_schema_names_both(tmp_path):
    write_set(tmp_path)
    with pytest.raises(DataError, match=r"ecar-latents-v1.* ecar-images-v1"):
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
    with pytest.raises(DataError, match="dataset_id"):
        load_manifest(tmp_path)


GOLDEN = Path(__file__).parents[1] / "golden"


def restate(folder, change):
    """Edit the manifest like an attacker who can also recompute its identity."""
    path = folder / MANIFEST_NAME
    tree = json.loads(path.read_text())
    change(tree)
    without = {key: value for key, value in tree.items() if key != "dataset_id"}
    if without["schema"] == "ecar-images-v1":
        without |= {"source": "", "location": None}
    canonical = json.dumps(without, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**tree, "dataset_id": hashlib.sha256(canonical).hexdigest()}))


def put(*place):
    """A change that sets the value at a place: `put("shards", 0, "name", "../x")`."""
    *way, key, value = place

    def change(tree):
        for step in way:
            tree = tree[step]
        tree[key] = value

    return change


def swap(tree):
    tree["shards"].reverse()


HOSTILE = {
    "a name that leads out": put("shards", 0, "name", "../../etc/passwd"),
    "an absolute name": put("shards", 0, "name", "/etc/passwd"),
    "a name with a newline": put("shards", 0, "name", "a\nb"),
    "a name that is a number": put("shards", 0, "name", 7),
    "one name twice": put("shards", 1, "name", "000000.tar"),
    "a negative count": put("shards", 0, "count", -3),
    "a count of nothing": put("shards", 0, "count", 0),
    "a count as text": put("shards", 0, "count", "3"),
    "a count that is true": put("shards", 0, "count", True),
    "a count for which the file has no room": put("shards", 0, "bytes", 1024),
    "a total that is not the sum": put("count", 7),
    "an absurd total": put("count", 10**30),
    "a first index with a gap": put("shards", 1, "first_index", 5),
    "shards in another order": swap,
    "no shards": put("shards", []),
    "a hash that is none": put("shards", 0, "sha256", "x" * 64),
    "a hash that is too short": put("shards", 0, "xxh3_128", "ab"),
    "no hash": put("shards", 0, "xxh3_128", ""),
    "no classes": put("num_classes", 0),
    "fewer names than classes": put("num_classes", 3),
    "a class name that a terminal obeys": put("class_names", 0, "\x1b[2J"),
    "a field that nobody knows": put("shards", 0, "more", 1),
    "a top field that nobody knows": put("more", 1),
}
LATENTS_ALONE = {
    "a row below zero": put("shards", 0, "first_row", -1),
    "rows of two shards overlap": put("shards", 1, "first_row", 3),
    "a missing row that is another's": put("shards", 0, "missing", [9]),
    "a missing row of a shard before": put("shards", 1, "missing", [3]),
    "missing rows that fall": put("shards", 0, "missing", [2, 1]),
    "rows past the last key": put("shards", 1, "first_row", 10**12),
    "moments without sides": put("moments_shape", [12]),
    "moments with a side of zero": put("moments_shape", [12, 0, 2]),
    "moments with a side below zero": put("moments_shape", [12, -2, -2]),
    "moments larger than memory": put("moments_shape", [65536, 65536, 65536]),
    "moments that its encoder does not make": put("moments_shape", [24, 2, 2]),
    "flip as a number": put("has_flip", 1),
    "a statistic that is not finite": put("statistics", "raw_mean", 0, float("1e999")),
    "a list of lists": put("statistics", "raw_mean", 0, [[1]]),
    "a number past int64": put("preprocessing", "order_seed", 10**40),
    "failures without a file's name": put("failures", {"count": 1}),
    "a file of failures elsewhere": put("failures", "file", "../../x"),
}
IMAGES_ALONE = {
    "a table elsewhere": put("shards", 0, "table", "../000000.npy"),
    "a table of no name": put("shards", 0, "table", ""),
    "a kind that nobody knows": put("shards", 0, "kind", "fifo"),
    "a location that a terminal obeys": put("location", "\x1b]0;x"),
}


def test_what_breaks_a_rule_is_refused_even_with_the_right_identity(tmp_path):
    """In a loop, because each case takes only a millisecond."""
    sets = {
        "latents": (load_manifest, {**HOSTILE, **LATENTS_ALONE}),
        "images": (load_image_manifest, {**HOSTILE, **IMAGES_ALONE}),
    }
    for name, (load, cases) in sets.items():
        folder = tmp_path / name
        folder.mkdir()
        for case, change in cases.items():
            shutil.copy(GOLDEN / name / MANIFEST_NAME, folder)
            restate(folder, change)
            with pytest.raises(DataError) as caught:
                load(folder)
            assert str(caught.value).isprintable(), case
            assert "dataset_id" not in str(caught.value), case
        shutil.copy(GOLDEN / name / MANIFEST_NAME, folder)
        restate(folder, lambda tree: None)
        load(folder)


def test_a_writer_refuses_what_a_reader_would(tmp_path):
    manifest = load_image_manifest(GOLDEN / "images")
    for wrong in ({"class_names": ["cat", "a\nb"]}, {"class_names": ["cat", "\udcff"]}, {"count": 7}):
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            write_manifest(tmp_path, dataclasses.replace(manifest, **wrong))
    assert list(tmp_path.iterdir()) == []


JUNK = {
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "cut": (GOLDEN / "latents" / MANIFEST_NAME).read_bytes()[:500],
    "empty": b"",
    "another type": b"[1]",
    "nested too deep": b'{"schema": ' + b"[" * 100_000,
    "a key twice": b'{"schema": "ecar-latents-v1", "schema": "ecar-latents-v1"}',
    "not a number": b'{"schema": "ecar-latents-v1", "count": NaN}',
    "a schema that a terminal obeys": b'{"schema": "\\u001b[2J"}',
}


def test_junk_is_one_line_for_every_reader(tmp_path):
    path = tmp_path / MANIFEST_NAME
    for case, text in JUNK.items():
        path.write_bytes(text)
        for read in (load_manifest, load_image_manifest, verify, stats):
            with pytest.raises(DataError) as caught:
                read(tmp_path)
            assert str(caught.value).isprintable(), case


def test_a_pipe_or_device_is_not_waited_for(tmp_path):
    path = tmp_path / MANIFEST_NAME
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        load_manifest(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        verify(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError):
        load_manifest(tmp_path)
    path.rmdir()
    path.touch()
    os.truncate(path, 40 << 30)
    with pytest.raises(DataError, match=" 1,073,741,824 "):
        load_manifest(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(tree, way=()):
    """Every place in a tree, as a path of keys."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield (*way, key)
        if isinstance(tree[key], dict | list):
            yield from places(tree[key], (*way, key))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=values)
def test_any_value_in_any_place_is_refused_or_does_no_harm(tmp_path, data, value):
    """A manifest that passes the rules goes through `stats` and `verify`, which at worst end with a one-line error."""
    if not (tmp_path / MANIFEST_NAME).exists():
        shutil.copytree(GOLDEN / "latents", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "latents" / MANIFEST_NAME, tmp_path)
    tree = json.loads((GOLDEN / "latents" / MANIFEST_NAME).read_text())
    way = data.draw(st.sampled_from(sorted(places(tree), key=str)))
    with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair, which no file can contain
        restate(tmp_path, put(*way, copy.deepcopy(value)))
        for read in (stats, verify):
            with contextlib.suppress(EcarError):
                read(tmp_path)
