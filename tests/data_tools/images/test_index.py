import contextlib
import json
import os
import random
import re
import tarfile

import fsspec
import numpy as np
import pytest

from data_tools.images import index as index_module
from data_tools.images import tar_samples
from data_tools.images.index import index
from data_tools.images.tar_samples import LabelRule, index_image_tar
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage import remote
from tests.data.image_sets import encoded, members_of, samples, what_webdataset_sees, write_tar, write_webdataset_tar
from tests.data.object_store import object_store, s3_server
from tests.data_tools.image_folders import content, encode_small, write_image_folder

__all__ = ["object_store", "s3_server"]


def read_all(folder):
    shards = ImageShards(folder)
    return [(record.key, record.data, record.label) for record in shards.read_many(range(len(shards)))]


def write_tars(folder, count=12, per_tar=5):
    folder.mkdir()
    data = samples(count)
    for first in range(0, count, per_tar):
        write_tar(folder / f"{first:03d}.tar", members_of(data[first : first + per_tar]))
    return data


def test_tars_stay_where_they_are(tmp_path, capsys):
    data = write_tars(tmp_path / "tars")
    before = content(tmp_path / "tars")
    index(str(tmp_path / "tars"), tmp_path / "index")
    assert f"next: ecar-data encode {tmp_path}/index LATENTS --vae NAME --image-size SIDE\n" in capsys.readouterr().out
    assert content(tmp_path / "tars") == before
    assert set(content(tmp_path / "index")) == {"manifest.json", "000000.npy", "000001.npy", "000002.npy"}
    assert read_all(tmp_path / "index") == data
    manifest = load_image_manifest(tmp_path / "index")
    assert [(entry.name, entry.count, entry.first_index) for entry in manifest.shards] == [
        ("000.tar", 5, 0),
        ("005.tar", 5, 5),
        ("010.tar", 2, 10),
    ]
    assert (manifest.count, manifest.num_classes, manifest.location) == (12, 10, str(tmp_path / "tars"))
    assert manifest.class_names == [str(label) for label in range(10)]


def test_the_index_is_the_same_each_time_and_everywhere(tmp_path):
    write_tars(tmp_path / "tars")
    filesystem = fsspec.filesystem("memory")
    for path in (tmp_path / "tars").iterdir():
        filesystem.pipe_file(f"/indexed/{path.name}", path.read_bytes())
    for name, source in (
        ("a", str(tmp_path / "tars")),
        ("b", str(tmp_path / "tars/*.tar")),
        ("c", "memory:///indexed"),
    ):
        index(source, tmp_path / name)
    filesystem.store.clear()
    tables = [{name: data for name, data in content(tmp_path / name).items() if name.endswith("npy")} for name in "abc"]
    assert tables[0] == tables[1] == tables[2]
    assert len({load_image_manifest(tmp_path / name).dataset_id for name in "abc"}) == 1


def test_images_in_class_folders_are_not_read(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "in")
    true_open = open

    def guarded(path, *arguments, **options):
        assert not str(path).startswith(str(root)), "an image was opened"
        return true_open(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", guarded)
    index(str(root), tmp_path / "index")
    monkeypatch.undo()
    found = read_all(tmp_path / "index")
    assert len(found) == 24
    assert found[8 + 2] == ("2.jpeg", (root / "cat/2.jpeg").read_bytes(), 1)
    assert load_image_manifest(tmp_path / "index").class_names == ["bird", "cat", "dog"]


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_encode_works_on_an_index_and_on_a_copy_alike(tmp_path, kind):
    if kind == "tars":
        write_tars(tmp_path / "in")
    else:
        write_image_folder(tmp_path / "in")
    index(str(tmp_path / "in"), tmp_path / "index")
    encode_small(tmp_path / "index", tmp_path / "a")
    encode_small(tmp_path / "index", tmp_path / "b", batch_size=2)
    tars = [{name: data for name, data in content(tmp_path / name).items() if name.endswith(".tar")} for name in "ab"]
    assert tars[0] == tars[1]
    assert len(tars[0]) == (3 if kind == "tars" else 5)


def test_each_byte_is_read_once_and_in_ranges(tmp_path, object_store):
    images = [(f"{key}.jpg", bytes(7 << 20)) for key in "abc"]
    path = write_tar(
        tmp_path / "0.tar", [member for image in images for member in (image, (f"{image[0][0]}.cls", b"1"))]
    )
    object_store.put("0.tar", path.read_bytes())
    object_store.break_on()
    index(f"{object_store.url}/0.tar", tmp_path / "index")
    requested = [re.findall(r"\d+", entry["range"]) for entry in object_store.log("GET", "0.tar")]
    ranges = sorted((int(first), int(last) + 1) for first, last in requested)
    assert len(ranges) > 2
    assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])], "no gaps, nothing twice"
    assert ranges[-1][1] == path.stat().st_size


def test_an_object_that_changes_while_it_is_read(tmp_path, monkeypatch):
    data = write_tar(tmp_path / "0.tar", members_of(samples(9))).read_bytes()
    fsspec.filesystem("memory").pipe_file("/changing/0.tar", data)
    tags = iter("abc")
    monkeypatch.setattr(remote, "stat", lambda url, _: remote.ObjectVersion(len(data), next(tags)))
    with pytest.raises(DataError, match=r"0\.tar changed while it was read"):
        index("memory:///changing/0.tar", tmp_path / "index")
    fsspec.filesystem("memory").store.clear()


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", members_of(samples(9)))
    found = tar_samples.index_image_tar(tmp_path, "0.tar", path.stat().st_size, LabelRule("cls"), foreign=True)
    assert len(found.rows) == 9
    with pytest.raises(DataError, match=r"0\.tar changed while it was read"):
        tar_samples.index_image_tar(tmp_path, "0.tar", path.stat().st_size - 512, LabelRule("cls"), foreign=True)


def one_sample(**parts):
    return [(f"k.{name.replace('_', '.')}", data) for name, data in parts.items()]


@pytest.mark.parametrize(
    ("parts", "label", "names", "expected"),
    [
        ({"JPG": b"x", "cls": b" 7\n"}, "cls", None, 7),
        ({"cls": b"7", "webp": b"x", "txt": b"caption"}, "cls", None, 7),
        ({"png": b"x", "cls": b"dog"}, "cls", "cat dog", 1),
        ({"jpeg": b"x", "json": b'{"a": 1, "id": 3}'}, "json:id", None, 3),
        ({"jpg": b"x", "json": b'{"id": "4"}', "cls": b"1"}, "json:id", None, 4),
        ({"jpg": b"x", "json": b'{"id": "dog"}'}, "json:id", "cat dog", 1),
        ({"jpg": b"x"}, "none", None, 0),
        ({"jpg": b"x", "seg_png": b"a mask", "cls": b"1"}, "cls", None, 1),
    ],
)
def test_where_labels_come_from(tmp_path, parts, label, names, expected):
    write_tar(tmp_path / "0.tar", one_sample(**parts))
    classes = tmp_path / "classes.txt" if names else None
    if classes:
        classes.write_text("\n".join(names.split()) + "\n")
    index(str(tmp_path / "0.tar"), tmp_path / "index", label=label, classes=classes)
    assert read_all(tmp_path / "index") == [("k", b"x", expected)]
    manifest = load_image_manifest(tmp_path / "index")
    assert manifest.class_names == (names.split() if names else [str(i) for i in range(expected + 1)])


TWO = [("a.jpg", b"x"), ("a.cls", b"1")]
TWO_B = [("b.jpg", b"x"), ("b.cls", b"1")]
REFUSED = {
    "no label": ([("a.jpg", b"x")], {}, r"sample 'a' .*\['jpg'\], needs one image .* and cls"),
    "no image": ([("a.cls", b"1")], {}, r"sample 'a' .*\['cls'\]"),
    "no image at the end": ([*TWO, ("b.cls", b"1")], {}, r"sample 'b' .*\['cls'\]"),
    "two images": ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], {}, "second png at 'a.png'"),
    "a part twice": ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], {}, "second cls at 'a.cls'"),
    "a key twice": ([*TWO, ("b.jpg", b"x"), ("b.cls", b"1"), *TWO], {}, "sample 'a' are not adjacent"),
    "apart": ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")], {"label": "none"}, "not adjacent"),
    "label far behind": ([("a.jpg", b"x"), *TWO_B, ("a.cls", b"1")], {}, r"'a' are not adjacent: 'a\.cls'"),
    "sorted by kind": (
        [("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", b"x"), ("b.jpg", b"x")],
        {},
        r"'a' are not adjacent: 'a\.jpg'",
    ),
    "label is not a number": ([("a.jpg", b"x"), ("a.cls", b"dog")], {}, "label 'dog' "),
    "label below zero": ([("a.jpg", b"x"), ("a.cls", b"-1")], {}, "label '-1' "),
    "label too large": ([("a.jpg", b"x"), ("a.cls", b"1" * 5000)], {}, r"0\.\.999999"),
    "label is not text": ([("a.jpg", b"x"), ("a.cls", b"\xff")], {}, "sample 'a': 'utf-8' codec"),
    "label is huge": ([("a.jpg", b"x"), ("a.cls", b"1" * (1 << 21))], {}, "has 2097152 bytes, the limit is 1048576"),
    "no json": ([("a.jpg", b"x"), ("a.json", b"{")], {"label": "json:id"}, "sample 'a': it is not JSON: Expecting"),
    "no field": ([("a.jpg", b"x"), ("a.json", b'{"x": 1}')], {"label": "json:id"}, "json has no field 'id'"),
    "no object": ([("a.jpg", b"x"), ("a.json", b"[1]")], {"label": "json:id"}, "json has no field 'id'"),
    "json that is code": ([("a.jpg", b"x"), ("a.json", b"__import__('os')")], {"label": "json:id"}, "Expecting value"),
    "deep json": ([("a.jpg", b"x"), ("a.json", b"[" * 200_000)], {"label": "json:id"}, "nested deeper than 32"),
    "true is not a label": (
        [("a.jpg", b"x"), ("a.json", b'{"id": true}')],
        {"label": "json:id"},
        "label True ",
    ),
    "only dotfiles": ([(".a.jpg", b"x"), ("README", b"x")], {}, "has no images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_or_ambiguous_tars_are_refused(tmp_path, name):
    members, options, message = REFUSED[name]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        index(str(tmp_path / "0.tar"), tmp_path / "index", **options)
    assert "0.tar" in str(caught.value) or name == "only dotfiles"
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["0.tar"], "nothing half-made is left"


def test_an_image_beyond_the_bound_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_IMAGE_BYTES", 100)
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x" * 101), ("a.cls", b"1")])
    with pytest.raises(DataError, match=r"'a\.jpg' has 101 bytes, the limit is 100"):
        index(str(tmp_path / "0.tar"), tmp_path / "index")


def test_member_names_are_never_paths(tmp_path):
    """The key is only text; no file of that name is opened or written."""
    write_tar(
        tmp_path / "0.tar", [("../../up.jpg", b"x"), ("../../up.cls", b"1"), ("/abs.jpg", b"y"), ("/abs.cls", b"0")]
    )
    index(str(tmp_path / "0.tar"), tmp_path / "deep/er/index")
    assert read_all(tmp_path / "deep/er/index") == [("../../up", b"x", 1), ("/abs", b"y", 0)]
    assert sorted(os.listdir(tmp_path / "deep/er/index")) == ["000000.npy", "manifest.json"]


@pytest.mark.parametrize("write", ["webdataset", "gnu", "pax", "ustar"])
def test_foreign_writers(tmp_path, write):
    data, path = samples(7), tmp_path / "0.tar"
    if write == "webdataset":
        write_webdataset_tar(path, data)
    else:
        write_tar(path, members_of(data), format=getattr(tarfile, f"{write.upper()}_FORMAT"), mtime=1.25)
    index(str(path), tmp_path / "index")
    assert read_all(tmp_path / "index") == data


def test_what_webdataset_does_with_tars_that_we_refuse(tmp_path):
    """Finding: a repeated key is two samples, missing parts are accepted, a cut tar is a smaller set, all silently."""
    path = tmp_path / "0.tar"
    write_tar(path, [*TWO, ("b.jpg", b"x"), ("b.cls", b"1"), *TWO])
    assert what_webdataset_sees(path) == 3
    write_tar(path, [("a.jpg", b"x"), ("b.cls", b"1")])
    assert what_webdataset_sees(path) == 2
    index(str(write_tar(path, members_of(samples(4)))), tmp_path / "whole")
    third = int(np.load(tmp_path / "whole/000000.npy")["offset"][2])
    os.truncate(path, third - 512)  # on the boundary between two samples
    assert what_webdataset_sees(path) == 2
    with pytest.raises(DataError, match=r"0\.tar"):
        index(str(path), tmp_path / "index")


def test_given_classes_of_folders(tmp_path):
    root = write_image_folder(tmp_path / "in")
    (tmp_path / "classes.txt").write_text("dog\nfish\nbird\ncat\n")
    index(str(root), tmp_path / "index", classes=tmp_path / "classes.txt")
    manifest = load_image_manifest(tmp_path / "index")
    assert manifest.class_names == ["dog", "fish", "bird", "cat"]
    assert [label for _, _, label in read_all(tmp_path / "index")] == [2] * 8 + [3] * 8 + [0] * 8
    (tmp_path / "classes.txt").write_text("dog\nbird\n")
    with pytest.raises(DataError, match=r" cat is not in --classes"):
        index(str(root), tmp_path / "other", classes=tmp_path / "classes.txt")
    index(str(root), tmp_path / "unlabelled", label="none")
    assert {label for _, _, label in read_all(tmp_path / "unlabelled")} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "jsn:x"}, "--label jsn:x is not known"),
        ({"label": "json:"}, "--label json: is not known"),
        ({"label": "json:id"}, "is for tars"),
        ({"classes": "none.txt"}, "cannot read --classes"),
        ({"classes": "twice.txt"}, "has 2 names, 1 different"),
        ({"classes": "empty.txt"}, "has 0 names"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    root = write_image_folder(tmp_path / "in")
    (tmp_path / "twice.txt").write_text("a\na\n")
    (tmp_path / "empty.txt").write_text("\n")
    if "classes" in options:
        options = {"classes": tmp_path / options["classes"]}
    with pytest.raises(ConfigError, match=message):
        index(str(root), tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()


def test_an_occupied_folder_is_left_alone(tmp_path):
    root = write_image_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(DataError, match="out is not empty"):
        index(str(root), tmp_path / "out")
    assert content(tmp_path / "out") == {"mine.txt": b"mine"}


def test_credentials_in_a_url_are_not_written_down(tmp_path):
    fsspec.filesystem("memory").pipe_file("/secret/a/0.jpg", encoded(0))
    index("memory:///secret", tmp_path / "index")
    fsspec.filesystem("memory").store.clear()
    tree = json.loads((tmp_path / "index/manifest.json").read_text())
    assert tree["location"] == tree["source"] == "memory:///secret"


def test_captions_are_not_labels(tmp_path, capsys):
    """As img2dataset writes them."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", [("0.jpg", b"x"), ("0.json", b"{}"), ("0.txt", b"a dog")])
    for name in ("0.parquet", "0_stats.json"):
        (tmp_path / "in" / name).write_text("x")
    with pytest.raises(DataError, match=r"captions .* --label none"):
        index(str(tmp_path / "in"), tmp_path / "index")
    with pytest.raises(ConfigError, match=r"--label txt: captions"):
        index(str(tmp_path / "in"), tmp_path / "index", label="txt")
    index(str(tmp_path / "in"), tmp_path / "index", label="none")
    assert "left out: 1 .parquet, 1 .json\n" in capsys.readouterr().out
    assert read_all(tmp_path / "index") == [("0", b"x", 0)]


def test_nested_files_are_read_by_their_places(tmp_path):
    root = write_image_folder(tmp_path / "in")
    (root / "cat/deep/er").mkdir(parents=True)
    (root / "cat/2.jpeg").rename(root / "cat/deep/er/2.jpeg")
    index(str(root), tmp_path / "index")
    found = read_all(tmp_path / "index")
    assert ("deep/er/2.jpeg", (root / "cat/deep/er/2.jpeg").read_bytes(), 1) in found
    assert ImageShards(tmp_path / "index").read(15).name == "cat/deep/er/2.jpeg"
    encode_small(tmp_path / "index", tmp_path / "latents")


def test_the_table_costs_24_bytes_and_the_key(tmp_path):
    write_tar(tmp_path / "0.tar", members_of(samples(30)))
    index(str(tmp_path / "0.tar"), tmp_path / "index")
    table = np.load(tmp_path / "index/000000.npy", allow_pickle=False)
    assert table.dtype.itemsize == 24 + 6
    assert table["label"].tolist() == [place % 10 for place in range(30)]


def test_json_of_other_programs_need_not_be_strict(tmp_path):
    """img2dataset writes NaN for unknown values, and captions with half of an emoji."""
    rule = LabelRule.parse("json:label")
    assert rule.read(b'{"similarity": NaN, "caption": "\\ud83d", "label": 3}') == 3


def test_tasks_share_the_tars_in_any_order(tmp_path, capsys):
    """The result is the same byte for byte, whichever task is last."""
    write_tars(tmp_path / "tars", count=24)
    index(str(tmp_path / "tars"), tmp_path / "alone")
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2, 2]):
        out = tmp_path / "-".join(map(str, order))
        for place, task in enumerate(order):
            assert not (out / "manifest.json").exists() or place == len(order) - 1
            index(str(tmp_path / "tars"), out, task=task, tasks=3)
        assert content(out) == content(tmp_path / "alone")
        assert not list(tmp_path.glob(".*"))
    assert "2 of 5 tars are indexed; other tasks make the rest" in capsys.readouterr().out


def test_a_stop_or_a_bad_tar_loses_no_other_tar(tmp_path, monkeypatch):
    write_tars(tmp_path / "tars", count=24)
    good = (tmp_path / "tars/015.tar").read_bytes()
    (tmp_path / "tars/015.tar").write_bytes(good[:10] + b"x" + good[11:])
    read = []
    monkeypatch.setattr(
        index_module, "index_image_tar", lambda *given, **how: read.append(given[1]) or index_image_tar(*given, **how)
    )
    monkeypatch.setattr(index_module, "_TARS_AT_ONCE", 1)
    with pytest.raises(DataError, match=r"015\.tar"):
        index(str(tmp_path / "tars"), tmp_path / "index")
    assert not (tmp_path / "index").exists()
    (tmp_path / "tars/015.tar").write_bytes(good)
    (tmp_path / ".index.indexing/000001.npy").unlink()
    before = len(read)
    index(str(tmp_path / "tars"), tmp_path / "index")
    # The missing table, the bad tar, and the tar after it, unless that one had started when the bad one was found.
    again = set(read[before:])
    assert {"005.tar", "015.tar"} <= again <= {"005.tar", "015.tar", "020.tar"}
    index(str(tmp_path / "tars"), tmp_path / "again")
    assert content(tmp_path / "index") == content(tmp_path / "again")


def test_an_unfinished_index_of_other_tars_or_options_is_not_continued(tmp_path):
    write_tars(tmp_path / "tars")
    index(str(tmp_path / "tars"), tmp_path / "index", task=0, tasks=2)
    with pytest.raises(DataError, match="other options"):
        index(str(tmp_path / "tars"), tmp_path / "index", label="none", task=1, tasks=2)
    index(str(tmp_path / "tars"), tmp_path / "index", label="none")
    assert load_image_manifest(tmp_path / "index").num_classes == 1
    index(str(tmp_path / "tars"), tmp_path / "index", task=0, tasks=2)  # a late task of an array


def test_a_task_that_is_none(tmp_path):
    write_tars(tmp_path / "tars")
    with pytest.raises(ConfigError, match="--task 2"):
        index(str(tmp_path / "tars"), tmp_path / "index", task=2, tasks=2)
    write_image_folder(tmp_path / "in")
    with pytest.raises(ConfigError, match="class folders"):
        index(str(tmp_path / "in"), tmp_path / "index", task=0, tasks=2)
    assert not (tmp_path / "index").exists()


KILLS = 15


def test_tasks_that_are_killed_anywhere_give_the_same_index(tmp_path, monkeypatch):
    """Random tasks that end at a random write, as if killed, then one run without a kill."""
    write_tars(tmp_path / "tars", count=24)
    index(str(tmp_path / "tars"), tmp_path / "alone")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng, true_replace = random.Random(0), os.replace
    for case in range(KILLS):
        out = tmp_path / f"{case}"
        tasks = rng.randint(1, 4)
        for _ in range(rng.randint(1, 4)):
            left = [rng.randint(0, 6)]

            def replace(*given, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                true_replace(*given)

            monkeypatch.setattr(os, "replace", replace)
            with contextlib.suppress(KeyboardInterrupt):
                if not (out / "manifest.json").exists():
                    index(str(tmp_path / "tars"), out, task=rng.randrange(tasks), tasks=tasks)
            monkeypatch.setattr(os, "replace", true_replace)
        if not (out / "manifest.json").exists():
            index(str(tmp_path / "tars"), out)
        assert content(out) == content(tmp_path / "alone"), case
