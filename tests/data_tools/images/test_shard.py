import errno
import json
import os
import re
import shutil
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_tools.images import shard as shard_module
from data_tools.images.index import index
from data_tools.images.shard import shard
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest
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
    names = [f"{place:06d}.{suffix}" for place in range(3) for suffix in ("idx", "names", "npy", "tar")]
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


def test_a_file_that_is_not_an_image_is_named_and_nothing_is_left(tmp_path):
    root = with_bad_files(write_image_folder(tmp_path / "in"), "dog/5.png")
    with pytest.raises(DataError, match=r"image 5\.png in dog cannot be decoded .* --max-bad allows 0") as caught:
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
    assert [(line["index"], line["shard"], line["key"], line["name"]) for line in listed] == [
        (0, "bird", "0.jpeg", "bird/0.jpeg"),
        (21, "dog", "5.png", "dog/5.png"),
    ]
    with pytest.raises(DataError, match="bad images: 2, --max-bad allows 1"):
        shard(str(root), tmp_path / "other", max_bad=0.05)


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_killed_command_continues_after_its_last_finished_shard(tmp_path, monkeypatch, holdout):
    """A KeyboardInterrupt leaves what a kill leaves."""
    root = with_bad_files(write_image_folder(tmp_path / "in"), "bird/0.jpeg", "cat/5.png")
    settings = {"samples_per_shard": 4, "max_bad": 0.5, "holdout": holdout}
    shard(str(root), tmp_path / "undisturbed", **settings)
    written = []
    original = shard_module._Part._write_shard

    def third_time_unlucky(part, samples):
        written.append(part.folder.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return original(part, samples)

    monkeypatch.setattr(shard_module._Part, "_write_shard", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        shard(str(root), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    shard(str(root), tmp_path / "out", **settings)
    assert len(written) == 3 + len(list((tmp_path / "out").rglob("*.tar"))) - 2, "two were not written again"
    for part in ("train", "heldout") if holdout else ("",):
        assert content(tmp_path / "out" / part) == content(tmp_path / "undisturbed" / part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "undisturbed"]


@pytest.mark.parametrize("change", ["source", "option", "torn", "record"])
def test_unfinished_work_that_does_not_fit_is_done_again(tmp_path, monkeypatch, change):
    root = write_image_folder(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard(str(root), tmp_path / "out", samples_per_shard=10)
    unfinished = tmp_path / ".out.unfinished"
    if change == "source":
        (root / "cat/1.png").unlink()
    elif change == "torn":
        (unfinished / "000001.tar").write_bytes(b"torn")
    elif change == "record":
        (unfinished / ".shards/-000001.json").write_text("{")
    size = 9 if change == "option" else 10
    shard(str(root), tmp_path / "out", samples_per_shard=size)
    shard(str(root), tmp_path / "undisturbed", samples_per_shard=size)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_two_commands_do_not_write_the_same_folder(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "in")
    original = shard_module.write_manifest

    def meanwhile(*values):
        with pytest.raises(DataError, match="another command is writing"):
            shard(str(root), tmp_path / "out")
        original(*values)

    monkeypatch.setattr(shard_module, "write_manifest", meanwhile)
    shard(str(root), tmp_path / "out")
    assert load_image_manifest(tmp_path / "out").count == 24


def test_a_shard_with_only_bad_files_is_not_written(tmp_path):
    root = with_bad_files(write_image_folder(tmp_path / "in"), "bird/2.jpeg", "bird/3.png", "dog/6.jpeg", "dog/7.png")
    shard(str(root), tmp_path / "out", samples_per_shard=2, max_bad=0.5)
    shards = ImageShards(tmp_path / "out")
    assert [entry.count for entry in shards.manifest.shards] == [2] * 10
    assert [entry.name for entry in shards.manifest.shards] == [f"{place:06d}.tar" for place in range(10)]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 10
    assert shards.read(2).key == "000000000004"


def test_formats_are_known_by_their_bytes(tmp_path):
    """ImageNet contains a PNG whose name ends in JPEG."""
    root = write_image_folder(tmp_path / "in")
    (root / "cat/1.png").rename(root / "cat/1.JPEG")
    shard(str(root), tmp_path / "out")
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert "000000000009.png" in tar.getnames()


def test_images_are_decoded(tmp_path):
    """The first bytes of a truncated image are right."""
    root = write_image_folder(tmp_path / "in")
    for name in ("cat/2.jpeg", "cat/3.png"):
        (root / name).write_bytes((root / name).read_bytes()[:-300])
    with pytest.raises(
        DataError, match=r"image 2\.jpeg in cat .*image 3\.png in cat .*bad images: 2, --max-bad allows 1"
    ):
        shard(str(root), tmp_path / "out", max_bad=0.05)
    shard(str(root), tmp_path / "out", max_bad=0.1)
    listed = [json.loads(line)["name"] for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert listed == ["cat/2.jpeg", "cat/3.png"]
    assert load_image_manifest(tmp_path / "out").count == 22


def test_the_bad_images_of_both_parts_come_in_one_error(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "in")
    for path in sorted((root / "cat").iterdir()):
        path.write_bytes(b"none")
    with pytest.raises(DataError, match=r"bad images: 8, --max-bad allows 0") as caught:
        shard(str(root), tmp_path / "out", holdout=0.25)
    assert all(f"{place}." in str(caught.value) for place in range(8))
    monkeypatch.setattr("data_tools.images.shard._EXCESS", 2)
    with pytest.raises(DataError, match=r"bad images: 3, --max-bad allows 0"):
        shard(str(root), tmp_path / "out")


def test_the_names_of_the_files_travel_with_the_shards(tmp_path):
    root = write_image_folder(tmp_path / "in")
    odd = os.fsdecode(b"a caf\xe9 \xf0\x9f\x8e\x89.png")
    (root / "cat/deep").mkdir()
    (root / "cat/1.png").rename(root / "cat/deep" / odd)
    shard(str(root), tmp_path / "out", samples_per_shard=10)
    shutil.rmtree(root)
    records = ImageShards(tmp_path / "out").read_many(range(24))
    names = [record.name for record in records]
    assert names[:2] == ["bird/0.jpeg", "bird/1.png"]
    assert "cat/deep/a caf\\xe9 🎉.png" in names
    assert records[12].where == "000000000012 (cat/5.png) in 000001.tar"
    (tmp_path / "out/000001.names").unlink()
    lost = ImageShards(tmp_path / "out").read(12)
    assert (lost.where, lost.name) == ("000000000012 in 000001.tar", "000001.tar/000000000012")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n\n", b"000000000002\tcat\x1b[31m\n", b"a" * 10_000])
def test_names_are_a_help_and_never_an_error(tmp_path, content):
    shard(str(write_image_folder(tmp_path / "in")), tmp_path / "out")
    (tmp_path / "out/000000.names").write_bytes(content)
    assert ImageShards(tmp_path / "out").read(2).where.isprintable()


def test_a_pipe_in_place_of_the_names_is_not_waited_for(tmp_path):
    shard(str(write_image_folder(tmp_path / "in")), tmp_path / "out")
    (tmp_path / "out/000000.names").unlink()
    os.mkfifo(tmp_path / "out/000000.names")
    assert ImageShards(tmp_path / "out").read(2).where == "000000000002 in 000000.tar"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("webdataset.TarWriter.write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        shard(str(write_image_folder(tmp_path / "in")), tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")


def test_every_format_is_copied_as_it_is(tmp_path):
    for name in ("a.gif", "b.tiff", "c.bmp", "d.avif", "e.webp"):
        (tmp_path / "in/only").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "in/only" / name)
    shard(str(tmp_path / "in"), tmp_path / "out")
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert [name for name in tar.getnames() if not name.endswith("cls")] == [
            f"{place:012d}.{kind}" for place, kind in enumerate(("gif", "tif", "bmp", "avif", "webp"))
        ]
    index(str(tmp_path / "out/*.tar"), tmp_path / "index")
    assert ImageShards(tmp_path / "index").read(1).name == "only/b.tiff"


def test_files_that_are_left_out_are_printed(tmp_path, capsys):
    root = write_image_folder(tmp_path / "in")
    for name in ("bird/a.svg", "cat/b.svg", "cat/deep/c.SVG", "notes.txt", "README"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    (root / "none").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "dog/8.gif", save_all=True, append_images=frames[1:])
    shard(str(root), tmp_path / "out")
    said = capsys.readouterr().out
    assert "left out: 3 .svg, 1 without extension, 1 .txt\n" in said
    assert re.search(r"skipped 1 .*: none\n", said)
    assert re.search(r"out: 25 images; 1 animated", said)
    assert load_image_manifest(tmp_path / "out").class_names == list(CLASSES)


def test_a_folder_without_classes(tmp_path):
    root = write_image_folder(tmp_path / "in") / "bird"
    shard(str(root), tmp_path / "out", flat=True)
    manifest = load_image_manifest(tmp_path / "out")
    assert (manifest.count, manifest.class_names) == (8, ["bird"])
    assert ImageShards(tmp_path / "out").read(0).name == "bird/0.jpeg"
    with pytest.raises(ConfigError, match=r"leave out --label, --classes and --flat"):
        shard(str(tmp_path / "out"), tmp_path / "again", flat=True)


def write_source(kind, root):
    """The same 24 samples as a folder, as a folder at a URL, as tars, as an index."""
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
    """Even if the failure comes from the batch that is read ahead."""
    root = write_image_folder(tmp_path / "in")
    index(str(root), tmp_path / "index")
    (root / "dog/7.png").unlink()
    monkeypatch.setattr("data_tools.images.shard._BATCH", 5)
    with pytest.raises(DataError, match=r"dog/7\.png does not exist"):
        shard(str(tmp_path / "index"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "index"]


def test_labels_that_a_source_has_cannot_be_chosen(tmp_path):
    for source in ("digits", write_source("index", tmp_path)):
        with pytest.raises(ConfigError, match="leave out --label"):
            shard(source, tmp_path / "out", label="none")


@pytest.mark.parametrize("max_bad", [-0.1, 1.0])
def test_a_limit_out_of_range(tmp_path, max_bad):
    with pytest.raises(ConfigError, match="--max-bad"):
        shard("digits", tmp_path / "out", max_bad=max_bad)


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.001])
def test_a_share_that_leaves_nothing(tmp_path, share):
    with pytest.raises(ConfigError, match="--holdout"):
        shard(str(write_image_folder(tmp_path / "in")), tmp_path / "out", holdout=share)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_sources(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        shard(str(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="has no class folders"):
        shard(str(tmp_path / "flat"), tmp_path / "out")
    (tmp_path / "flat/empty").mkdir()
    with pytest.raises(DataError, match=r"none of its 1 class folders "):
        shard(str(tmp_path / "flat"), tmp_path / "out")
