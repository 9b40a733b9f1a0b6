import os

import fsspec
import pytest

from data_tools.cli import main
from data_tools.images.sources import ClassFolders, FoundFile, Tars, find_source
from ecar_dist.errors import ConfigError, DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def names(found):
    return [file.name for file in found.files]


@pytest.fixture
def bucket():
    filesystem = fsspec.filesystem("memory")

    def put(*paths):
        for path in paths:
            filesystem.pipe_file(f"/bucket/{path}", path.encode())
        return "memory:///bucket"

    yield put
    filesystem.store.clear()


IMAGENET = (
    "n02/b_2.JPEG",
    "n02/a_10.JPEG",
    "n02/a_9.jpeg",
    "n01/c.JPG",
    "n01/.hidden.jpg",
    "n01/notes.txt",
    ".git/x.png",
)


def check_imagenet(found):
    assert isinstance(found, ClassFolders)
    assert list(found.classes) == ["n01", "n02"]
    assert found.classes["n01"] == [FoundFile("c.JPG", len("n01/c.JPG"))]
    assert [file.name for file in found.classes["n02"]] == ["a_10.JPEG", "a_9.jpeg", "b_2.JPEG"]
    assert found.left_out == {".txt": 1}


def test_class_folders_on_disk_and_behind_a_url(tmp_path, bucket, monkeypatch):
    check_imagenet(find_source(str(touch(tmp_path, *IMAGENET))))
    check_imagenet(find_source(f"file://{tmp_path}"))
    check_imagenet(find_source(bucket(*IMAGENET)))
    monkeypatch.chdir(tmp_path.parent)
    assert find_source(tmp_path.name).location == str(tmp_path), "a worker may start in another folder"


def test_classes_are_sorted_by_their_names_alone(tmp_path, bucket):
    """Object stores sort whole paths, where a space comes before the slash."""
    present = ("a/x.png", "a b/x.png", "B/x.png", "é/x.png")
    for source in (str(touch(tmp_path, *present)), bucket(*present)):
        assert list(find_source(source).classes) == ["B", "a", "a b", "é"]


def test_linked_class_folders_count(tmp_path):
    touch(tmp_path, "real/a.png", "set/b/b.png")
    (tmp_path / "set/a").symlink_to(tmp_path / "real")
    assert list(find_source(str(tmp_path / "set")).classes) == ["a", "b"]


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (("a/x.txt", "b/x.svg"), "none of its 2 class folders"),
        (("a/x.png", "loose.png"), r"loose\.png .*--flat"),
        (("a/x.png", "0.tar"), "has both 0.tar and class folders"),
        (("a.png", "b.png"), "has no class folders .*--flat"),
        (("readme.txt",), "has no class folders"),
    ],
)
def test_trees_that_would_lose_images_are_refused(tmp_path, bucket, present, message):
    for source in (str(touch(tmp_path, *present)), bucket(*present)):
        with pytest.raises(DataError, match=message) as caught:
            find_source(source)
        assert "\n" not in str(caught.value)


NESTED = ("cat/x.png", "cat/big/x.png", "cat/big/old/y.gif", "cat.d/z.TIFF", "dog/n/1.bmp", "empty/readme.md", "a.svg")


def test_images_at_any_depth_belong_to_the_class_at_the_top(tmp_path, bucket):
    """As in torchvision's ImageFolder."""
    for source in (str(touch(tmp_path, *NESTED)), bucket(*NESTED)):
        found = find_source(source)
        assert {name: [file.name for file in files] for name, files in found.classes.items()} == {
            "cat": ["big/old/y.gif", "big/x.png", "x.png"],
            "cat.d": ["z.TIFF"],
            "dog": ["n/1.bmp"],
        }
        assert found.empty == ["empty"]
        assert found.left_out == {".md": 1, ".svg": 1}
        assert found.notes == []


def test_folders_of_class_folders_are_pointed_out(tmp_path, bucket):
    present = ("train/n01/a.png", "val/n01/a.png")
    for source in (str(touch(tmp_path, *present)), bucket(*present)):
        found = find_source(source)
        assert list(found.classes) == ["train", "val"]
        assert f"{source}/train" in found.notes[0]


def test_all_images_as_one_class(tmp_path, bucket):
    present = ("b.png", "a/x.jpg", ".hidden.png", "notes.txt")
    for source in (str(touch(tmp_path / "deep", *present)), bucket(*(f"deep/{name}" for name in present)) + "/deep"):
        found = find_source(source, flat=True)
        assert found.location == source.removesuffix("/deep")
        assert {name: [file.name for file in files] for name, files in found.classes.items()} == {
            "deep": ["a/x.jpg", "b.png"]
        }
        assert found.left_out == {".txt": 1}
    with pytest.raises(ConfigError, match="--flat is for folders"):
        find_source(f"{tmp_path}/*.tar", flat=True)


def test_one_error_lists_all_problems(tmp_path):
    touch(tmp_path, "a/x.png", "loose.png", "looser.jpg")
    (tmp_path / "a/new\nline.png").write_bytes(b"x")
    (tmp_path / "a/broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a/round").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (tmp_path / os.fsdecode(b"n\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"n\xe9") / "x.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path))
    text = str(caught.value)
    assert "has 6 problems: (1) " in text
    for what in (r"new\nline.png", "a/broken.png", "a/round", "a/pipe.png", "loose.png and 1 more", "n\\xe9"):
        assert what in text
    assert text.isprintable()


def test_a_file_name_that_is_not_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xf0\x9f\x8e\x89.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"x")
    assert find_source(str(tmp_path)).classes == {"a": [FoundFile(name, 1)]}


def test_what_lies_beside_tars_is_counted(tmp_path, bucket):
    """For example, the files of img2dataset."""
    present = ("0.tar", "0.parquet", "0_stats.json", "1.tar", "1.parquet")
    for source in (str(touch(tmp_path, *present)), bucket(*present)):
        assert find_source(source).left_out == {".parquet": 2, ".json": 1}


TARS = ("t/train-000.tar", "t/train-001.tar", "t/val-000.tar", "t/notes.txt", "t/deep/x.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("t", ["train-000.tar", "train-001.tar", "val-000.tar"]),
        ("t/train-{000..001}.tar", ["train-000.tar", "train-001.tar"]),
        ("t/{val,train}-000.tar", ["train-000.tar", "val-000.tar"]),
        ("t/train-*.tar", ["train-000.tar", "train-001.tar"]),
        ("t/{val,train}-*.tar", ["train-000.tar", "train-001.tar", "val-000.tar"]),
        ("t/val-00?.tar", ["val-000.tar"]),
        ("t/val-000.tar", ["val-000.tar"]),
    ],
)
def test_tars_by_folder_and_pattern(tmp_path, bucket, pattern, expected):
    touch(tmp_path, *TARS[:-1])
    found = find_source(f"{tmp_path}/{pattern}")
    assert isinstance(found, Tars)
    assert names(found) == expected
    assert (found.location, found.files[0].size) == (str(tmp_path / "t"), len(f"t/{expected[0]}"))
    there = find_source(f"{bucket(*TARS[:-1])}/{pattern}")
    assert there == Tars("memory:///bucket/t", found.files)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t/none-*.tar", "no file matches"),
        ("none/*.tar", "no file matches|check the URL"),
        ("t/train-{000..002}.tar", r"train-002\.tar"),
        ("{t,u}/train-000.tar", "several folders"),
        ("*/train-000.tar", "several folders"),
        ("t/{train,train}-000.tar", r"names train-000\.tar twice"),
        ("t/train-{000..001.tar", "train-"),
    ],
)
def test_patterns_that_match_nothing_or_too_much(tmp_path, bucket, pattern, message):
    touch(tmp_path, *TARS)
    for source in (f"{tmp_path}/{pattern}", f"{bucket(*TARS)}/{pattern}"):
        with pytest.raises(DataError, match=message) as caught:
            find_source(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["t", "t/0.tar.gz", "t/{0..1}.tar.gz"])
def test_compressed_tars_are_refused(tmp_path, bucket, pattern):
    present = ("t/0.tar.gz", "t/1.tar.gz", "t/2.tar")
    touch(tmp_path, *present)
    for source in (f"{tmp_path}/{pattern}", f"{bucket(*present)}/{pattern}"):
        with pytest.raises(DataError, match=r"0\.tar\.gz is compressed, .*; gunzip it to a \.tar"):
            find_source(source)


def test_a_missing_source(tmp_path, bucket):
    with pytest.raises(DataError, match=r"s3:/bucket/x is not a folder; did you mean s3://bucket/x\?"):
        find_source("s3:/bucket/x")
    with pytest.raises(DataError, match=r"none is not a folder; .*`digits`"):
        find_source(str(tmp_path / "none"))
    bucket("a/x.png")
    with pytest.raises(DataError):
        find_source("memory:///other")


@pytest.mark.parametrize("verb", ["index", "shard"])
def test_a_pipe_in_the_place_of_a_tar_is_not_waited_for(tmp_path, verb, capsys):
    os.mkfifo(tmp_path / "a.tar")
    assert main([verb, str(tmp_path / "a.tar"), str(tmp_path / "out")]) == 1
    assert "a.tar" in capsys.readouterr().err
