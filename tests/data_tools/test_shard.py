import json
import tarfile

import fsspec
import numpy as np
import pytest

from data_tools.index import index
from data_tools.shard import shard
from ecar_dist.data.image_shards import ImageShards
from ecar_dist.errors import ConfigError, DataError
from tests.data_tools.image_folders import CLASSES, content, write_image_folder


def test_a_folder_keeps_bytes_classes_and_order(tmp_path):
    root = write_image_folder(tmp_path / "in")
    shard(str(root), tmp_path / "out", samples_per_shard=10)
    shards = ImageShards(tmp_path / "out")
    assert shards.manifest.class_names == list(CLASSES)
    assert [entry.count for entry in shards.manifest.shards] == [10, 10, 4]
    record = shards.read(8 * 1 + 2)  # the third file of the second class
    assert record.label == 1
    assert record.data == (root / "cat/2.jpeg").read_bytes()
    names = [f"{place:06d}.{suffix}" for place in range(3) for suffix in ("idx", "npy", "tar")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "manifest.json"]


def test_the_split_is_stratified_disjoint_and_seeded(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shard("digits", tmp_path / name, holdout=0.25, seed=seed)
    parts = {name: ImageShards(tmp_path / "a" / name) for name in ("train", "heldout")}
    keys = {name: [part.read(index).key for index in range(len(part))] for name, part in parts.items()}
    assert not set(keys["train"]) & set(keys["heldout"])
    assert sorted(keys["train"] + keys["heldout"]) == [f"{index:012d}" for index in range(1797)]
    held = np.bincount([parts["heldout"].read(index).label for index in range(len(keys["heldout"]))])
    both = held + np.bincount([parts["train"].read(index).label for index in range(len(keys["train"]))])
    assert np.abs(held - both / 4).max() <= 0.5
    assert content(tmp_path / "a/train") == content(tmp_path / "b/train")
    assert content(tmp_path / "a/train") != content(tmp_path / "c/train")


def test_an_occupied_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(DataError, match="out is not empty; remove it"):
        shard("digits", tmp_path / "out")
    assert content(tmp_path / "out") == {"mine.txt": b"mine"}


def with_bad_files(root, *names):
    for name in names:
        (root / name).write_bytes(b"<html>not an image</html>")
    return root


def test_a_file_that_is_no_image_is_named_and_nothing_is_left(tmp_path):
    root = with_bad_files(write_image_folder(tmp_path / "in"), "dog/5.png")
    with pytest.raises(DataError, match=r"image 5\.png in dog cannot be read .* --max-bad allows 0") as caught:
        shard(str(root), tmp_path / "out", samples_per_shard=4)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_files_within_the_bound_are_left_out_and_listed(tmp_path):
    root = with_bad_files(write_image_folder(tmp_path / "in"), "bird/0.jpeg", "dog/5.png")
    shard(str(root), tmp_path / "out", samples_per_shard=10, max_bad=0.1)
    shards = ImageShards(tmp_path / "out")
    assert [entry.count for entry in shards.manifest.shards] == [9, 10, 3]
    keys = [record.key for record in shards.read_many(range(22))]
    assert keys == [f"{place:012d}" for place in range(24) if place not in (0, 21)], "the others keep their places"
    listed = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert [(line["index"], line["shard"], line["key"]) for line in listed] == [
        (0, "bird", "0.jpeg"),
        (21, "dog", "5.png"),
    ]
    with pytest.raises(DataError, match="bad images so far: 2, --max-bad allows 1"):
        shard(str(root), tmp_path / "other", max_bad=0.05)


def test_a_shard_of_bad_files_alone_is_no_shard(tmp_path):
    root = with_bad_files(write_image_folder(tmp_path / "in"), "bird/2.jpeg", "bird/3.png", "dog/6.jpeg", "dog/7.png")
    shard(str(root), tmp_path / "out", samples_per_shard=2, max_bad=0.5)
    shards = ImageShards(tmp_path / "out")
    assert [entry.count for entry in shards.manifest.shards] == [2] * 10
    assert [entry.name for entry in shards.manifest.shards] == [f"{place:06d}.tar" for place in range(10)]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 10
    assert shards.read(2).key == "000000000004"


def test_formats_are_known_by_their_bytes(tmp_path):
    """ImageNet holds a PNG whose name ends in JPEG."""
    root = write_image_folder(tmp_path / "in")
    (root / "cat/1.png").rename(root / "cat/1.JPEG")
    shard(str(root), tmp_path / "out")
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert "000000000009.png" in tar.getnames()


def write_source(kind, root):
    """The same 24 samples as a folder, as a folder behind a URL, as tars, as an index."""
    folder = write_image_folder(root / "in")
    if kind == "url":
        for path in folder.rglob("*.*"):
            fsspec.filesystem("memory").pipe_file(f"/in/{path.relative_to(folder)}", path.read_bytes())
        return "memory:///in"
    if kind == "index":
        index(str(folder), root / "index")
        return str(root / "index")
    if kind == "shards":
        shard(str(folder), root / "shards", samples_per_shard=9)
        return str(root / "shards")
    if kind == "tars":
        shard(str(folder), root / "shards", samples_per_shard=9)
        return str(root / "shards/*.tar")
    return str(folder)


@pytest.mark.parametrize("kind", ["url", "index", "shards", "tars"])
def test_every_source_gives_the_same_shards(tmp_path, kind):
    shard(write_source("folder", tmp_path / "a"), tmp_path / "expected", samples_per_shard=10)
    shard(write_source(kind, tmp_path / "b"), tmp_path / "out", samples_per_shard=10)
    fsspec.filesystem("memory").store.clear()
    expected, found = content(tmp_path / "expected"), content(tmp_path / "out")
    del expected["manifest.json"], found["manifest.json"]  # it names the source
    assert found == expected


def test_shuffled_by_a_seed(tmp_path):
    root = str(write_image_folder(tmp_path / "in"))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shard(root, tmp_path / name, samples_per_shard=10, shuffle=True, seed=seed)
    shard(root, tmp_path / "plain", samples_per_shard=10)
    keys = {name: [r.key for r in ImageShards(tmp_path / name).read_many(range(24))] for name in ("a", "c", "plain")}
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert keys["a"] != keys["c"]
    assert sorted(keys["a"]) == sorted(keys["c"]) == keys["plain"]
    assert len(set(ImageShards(tmp_path / "a").labels()[:10].tolist())) > 1


def test_a_reader_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Even where the failure comes from the batch read ahead."""
    root = write_image_folder(tmp_path / "in")
    index(str(root), tmp_path / "index")
    (root / "dog/7.png").unlink()
    monkeypatch.setattr("data_tools.shard._BATCH", 5)
    with pytest.raises(DataError, match=r"dog/7\.png does not exist"):
        shard(str(tmp_path / "index"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "index"]


def test_labels_that_are_settled_are_not_chosen_again(tmp_path):
    for source in ("digits", write_source("index", tmp_path)):
        with pytest.raises(ConfigError, match="are settled; leave out --label"):
            shard(source, tmp_path / "out", label="none")


@pytest.mark.parametrize("max_bad", [-0.1, 1.0])
def test_a_bound_that_is_none(tmp_path, max_bad):
    with pytest.raises(ConfigError, match="--max-bad"):
        shard("digits", tmp_path / "out", max_bad=max_bad)


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.001])
def test_a_share_that_leaves_nothing(tmp_path, share):
    with pytest.raises(ConfigError, match="--holdout"):
        shard(str(write_image_folder(tmp_path / "in")), tmp_path / "out", holdout=share)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        shard(str(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="has no class folders"):
        shard(str(tmp_path / "flat"), tmp_path / "out")
    (tmp_path / "flat/empty").mkdir()
    with pytest.raises(DataError, match="empty has no image"):
        shard(str(tmp_path / "flat"), tmp_path / "out")
