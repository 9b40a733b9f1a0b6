import json

import numpy as np
import pytest

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
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:3] == ["000000.idx", "000000.tar", "000001.idx"]


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


def test_an_unreadable_image_is_named_and_nothing_is_left(tmp_path):
    root = write_image_folder(tmp_path / "in")
    (root / "dog/5.png").write_bytes((root / "dog/5.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"dog/5\.png cannot be decoded"):
        shard(str(root), tmp_path / "out", samples_per_shard=4)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


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


def test_the_index_equals_that_of_dalis_tool(tmp_path):
    from wds2idx import IndexCreator

    shard("digits", tmp_path / "out")
    with IndexCreator(str(tmp_path / "out/000000.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_bytes() == (tmp_path / "out/000000.idx").read_bytes()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["source"] == "digits"
