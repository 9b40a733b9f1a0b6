import dataclasses
import json
import os
import random
import threading
import time
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_tools.images.index import index
from data_tools.images.shard import shard
from ecar_dist.data.images import shards as image_shards
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest, write_manifest
from ecar_dist.data.shards.store import CacheOptions, open_store
from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from tests.data.image_sets import encoded, members_of, samples, write_tar


@pytest.fixture
def folder(tmp_path):
    shard("digits", tmp_path / "images", samples_per_shard=700)
    return tmp_path / "images"


def write_tars(root, count=12, per_tar=5):
    """Write the tars of a source to root/tars and their index to root/index. Returns the samples in them."""
    (root / "tars").mkdir()
    content = samples(count)
    for first in range(0, count, per_tar):
        write_tar(root / f"tars/{first:03d}.tar", members_of(content[first : first + per_tar]))
    index(str(root / "tars"), root / "index")
    return content


def write_class_folders(root, per_class=3):
    for label, name in enumerate(("b", "a c", "ü")):
        (root / "classes" / name).mkdir(parents=True)
        for place in range(per_class):
            (root / "classes" / name / f"{place}.JPEG").write_bytes(encoded(10 * label + place))
    index(str(root / "classes"), root / "index")


def upload(local, url):
    """Copy a folder to fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{url}/{path.relative_to(local)}", path.read_bytes())
    return f"memory://{url}"


@pytest.fixture
def bucket():
    """A prefix in memory that is deleted after the test."""
    filesystem = fsspec.filesystem("memory")
    yield "/bucket"
    filesystem.store.clear()


def test_random_access(folder):
    shards, digits, decoder = ImageShards(folder), load_digits(), open_decoder("pil")
    assert len(shards) == 1797
    assert [entry.count for entry in shards.manifest.shards] == [700, 700, 397]
    for sample_index in (0, 699, 700, 1400, 1796):
        record = shards.read(sample_index)
        pixels = decoder.decode([record.data], [record.where])[0]
        assert np.array_equal(pixels[..., 0], np.round(digits.images[sample_index] * 255 / 16))
        assert (record.label, record.key) == (digits.target[sample_index], f"{sample_index:012d}")
    assert shards.labels().tolist() == digits.target.tolist()
    assert shards.labels().dtype == np.int64


def test_many_samples_in_the_requested_order(tmp_path):
    content = write_tars(tmp_path)
    shards = ImageShards(tmp_path / "index")
    asked = [11, 0, 5, 5, 4, 10]
    records = shards.read_many(np.array(asked))
    assert [(record.key, record.data, record.label) for record in records] == [content[place] for place in asked]
    assert records[2].where == "000005 in 005.tar"
    assert shards.read_many([]) == []
    for outside in (-1, 12):
        with pytest.raises(DataError, match=rf"sample {outside} .*0\.\.11"):
            shards.read_many([0, outside])


def test_class_directories(tmp_path):
    write_class_folders(tmp_path)
    shards = ImageShards(tmp_path / "index")
    records = shards.read_many(range(9))
    assert shards.manifest.class_names == ["a c", "b", "ü"]
    assert [record.label for record in records] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert records[0].data == encoded(10)
    assert records[8].where == "2.JPEG in ü"


@pytest.mark.parametrize("write", [write_tars, write_class_folders])
def test_the_tables_that_are_kept_are_bounded(tmp_path, monkeypatch, write):
    write(tmp_path)
    shards = ImageShards(tmp_path / "index")
    everything = shards.read_many(range(len(shards)))
    labels = shards.labels()
    one = max(table.nbytes for table in shards._tables.values())
    assert len(shards._tables) == len(shards.manifest.shards) > 2
    monkeypatch.setattr(image_shards, "TABLE_BYTES", one)
    order = random.Random(0).choices(range(len(shards)), k=30)
    for place in order:
        assert shards.read_many([place]) == [everything[place]]
        assert len(shards._tables) <= 2  # the one that is kept, and the one that this read needed
    assert shards.labels().tolist() == labels.tolist() == [record.label for record in everything]
    assert len(shards._tables) == 1


@pytest.mark.parametrize("write", [write_tars, write_class_folders])
def test_remote_images_and_tables(tmp_path, bucket, write):
    """Everything is behind URLs, the manifest too; then the images of the same set move."""
    write(tmp_path)
    local = ImageShards(tmp_path / "index")
    source = tmp_path / ("tars" if local.manifest.in_tars else "classes")
    manifest = dataclasses.replace(local.manifest, location=upload(source, f"{bucket}/images"))
    write_manifest(tmp_path / "index", manifest)
    there = ImageShards(upload(tmp_path / "index", f"{bucket}/index"))
    everything = list(range(len(local)))
    assert there.read_many(everything) == local.read_many(everything)
    assert there.manifest.dataset_id == local.manifest.dataset_id, "the location is not part of the identity"


def test_remote_reads_overlap(tmp_path, bucket, monkeypatch):
    """An object store takes tens of milliseconds per response, so reads must not wait for each other."""
    content = write_tars(tmp_path)
    url = upload(tmp_path / "tars", f"{bucket}/tars")
    index(f"{url}/*.tar", tmp_path / "remote")
    together, true_read = threading.Barrier(8, timeout=60), remote.read_range

    def read(*arguments):
        together.wait()
        return true_read(*arguments)

    monkeypatch.setattr(image_shards.remote, "read_range", read)
    order = range(11, 3, -1)  # no image directly follows the one read before it
    records = ImageShards(tmp_path / "remote").read_many(order)
    assert [record.data for record in records] == [content[i][1] for i in order]


@pytest.mark.parametrize("through_store", [False, True])
def test_through_a_store_the_same_records(tmp_path, bucket, through_store):
    content = write_tars(tmp_path)
    where = tmp_path / "tars"
    if through_store:
        where = upload(where, f"{bucket}/tars")
    manifest = load_image_manifest(tmp_path / "index")
    cache = CacheOptions(root=tmp_path / "cache")
    store = open_store(where, manifest.dataset_id, manifest.shards, cache)
    shards = ImageShards(tmp_path / "index", store)
    assert [record.data for record in shards.read_many([7, 2, 11])] == [content[place][1] for place in (7, 2, 11)]
    shards.forget({0})
    assert [record.data for record in shards.read_many([7, 2])] == [content[place][1] for place in (7, 2)]
    store.close()


def damage(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_found(tmp_path):
    content = write_tars(tmp_path)
    path = tmp_path / "tars/005.tar"
    damage(path, 512 + 20)
    shards = ImageShards(tmp_path / "index")
    assert shards.read(6).data == content[6][1], "other images of the shard are proven one by one"
    for asked in ([4, 5], [5, 6, 7]):  # alone, and in one read with others
        with pytest.raises(DataError, match=r"005\.tar\b.* 000005 .* 512 .*xxh3_64 \w{16}\b.* \w{16}\b"):
            shards.read_many(asked)
    os.truncate(path, 1024)
    with pytest.raises(DataError, match=r"005\.tar\b.* 1024 "):
        ImageShards(tmp_path / "index")
    with pytest.raises(DataError, match=r"005\.tar\b.* 000006 .* 3072 .*bytes 0\b"):
        shards.read(6)
    path.unlink()
    with pytest.raises(DataError, match=r"005\.tar"):
        ImageShards(tmp_path / "index")
    with pytest.raises(DataError, match=r"005\.tar\b.*No such file"):
        shards.read(6)


def test_files_that_change_or_go(tmp_path):
    write_class_folders(tmp_path)
    shards = ImageShards(tmp_path / "index")
    path = tmp_path / "classes/b/1.JPEG"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"classes/b\b.* 1\.JPEG .*bytes \d+"):
        shards.read(4)
    path.unlink()
    with pytest.raises(DataError, match=r"b/1\.JPEG .*`ecar-data index "):
        shards.read(4)
    for name in ("0.JPEG", "2.JPEG"):
        (tmp_path / "classes/b" / name).unlink()
    (tmp_path / "classes/b").rmdir()
    with pytest.raises(DataError, match=r"classes/b "):
        ImageShards(tmp_path / "index")


def test_a_damaged_table_is_found(tmp_path):
    write_tars(tmp_path)
    damage(tmp_path / "index/000001.npy", 200)
    shards = ImageShards(tmp_path / "index")
    shards.read(0)
    with pytest.raises(DataError, match=r"000001\.npy has xxh3_128"):
        shards.read(5)


def test_a_moved_set_is_fixed_by_hand(tmp_path):
    content = write_tars(tmp_path)
    (tmp_path / "tars").rename(tmp_path / "elsewhere")
    path = tmp_path / "index/manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "location": str(tmp_path / "elsewhere")}))
    assert ImageShards(tmp_path / "index").read(3).data == content[3][1]
    path.write_text(json.dumps({**tree, "num_classes": 11}))
    with pytest.raises(DataError, match="dataset_id"):
        ImageShards(tmp_path / "index")


def test_an_object_store_that_stumbles(tmp_path, object_store):
    """A real S3 server: names with spaces and non-ASCII letters, one GET per image, and failed ones are retried."""
    write_class_folders(tmp_path)
    for path in (tmp_path / "classes").rglob("*.JPEG"):
        object_store.put(quote(f"classes/{path.parent.name}/{path.name}"), path.read_bytes())
    index(f"{object_store.url}/classes", tmp_path / "there")
    assert load_image_manifest(tmp_path / "there").dataset_id == load_image_manifest(tmp_path / "index").dataset_id
    object_store.break_on({"kind": "status", "status": 503, "match": "/a", "times": 2}, {"kind": "reset", "at": 9})
    asked = [8, 0, 5, 1, 2]
    assert ImageShards(tmp_path / "there").read_many(asked) == ImageShards(tmp_path / "index").read_many(asked)
    assert len(object_store.log()) == len(asked) + 3
    assert object_store.log("HEAD") == [], "the table knows the sizes"


def test_objects_that_change_or_come_cut(tmp_path, object_store):
    write_class_folders(tmp_path)
    before = (tmp_path / "classes/b/1.JPEG").read_bytes()
    for path in (tmp_path / "classes/b").iterdir():
        object_store.put(f"classes/b/{path.name}", path.read_bytes())
    index(f"{object_store.url}/classes", tmp_path / "there")
    shards = ImageShards(tmp_path / "there")
    object_store.break_on({"kind": "short", "at": 9}, {"kind": "truncate", "at": 9})
    assert shards.read(1).data == before, "the connection's fault, not the object's"
    assert len(object_store.log()) == 3
    for size in (len(before) + 5, len(before) - 5, 0):
        object_store.put("classes/b/1.JPEG", (before * 2)[:size])
        with pytest.raises(DataError, match=rf"b/1\.JPEG .*\b{size} bytes, {len(before)} "):
            shards.read(1)


def test_closing_ends_reads_that_are_retried(tmp_path, object_store):
    write_tars(tmp_path)
    index(object_store.put_folder(tmp_path / "tars", "tars/"), tmp_path / "there")
    object_store.break_on({"kind": "status", "status": 503, "times": None})
    shards = ImageShards(tmp_path / "there")
    threading.Timer(0.5, shards.close).start()
    began = time.monotonic()
    with pytest.raises(DataError, match="stopped"):
        shards.read_many(range(12))
    assert time.monotonic() - began < 60
    with pytest.raises(DataError, match="stopped"):
        shards.read_many(range(12))


def test_tars_in_an_object_store_are_read_once(tmp_path, object_store):
    content = write_tars(tmp_path)
    url = object_store.put_folder(tmp_path / "tars", "tars/")
    object_store.break_on()
    index(f"{url}/{{000..010..5}}.tar", tmp_path / "there")
    assert len(object_store.log()) == 3, "a header costs no request of its own"
    object_store.break_on({"kind": "truncate", "at": 9})
    shards = ImageShards(tmp_path / "there")
    assert [record.data for record in shards.read_many([6])] == [content[6][1]], "a short body is asked for again"
    object_store.break_on({"kind": "corrupt", "at": 9})
    with pytest.raises(DataError, match=r"s3://.*/tars/005\.tar\b.* 000007 .*xxh3_64"):
        shards.read(7)
