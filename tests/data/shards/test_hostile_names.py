"""Names in manifests and tables that lead outside their folder, or contain control characters for a terminal."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from data_tools.cli import main
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.order.lanes import rank_positions
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import LatentSource
from ecar_dist.errors import DataError
from ecar_dist.storage.remote import join, list_files
from tests.data.image_sets import encoded, members_of, write_class_directory, write_tar, write_unchecked
from tests.data.latent_sets import write_set
from tests.data.object_store import QUICK

HOSTILE = ["../../x", "/etc/x", "a/../../b", "..", ".", "", "a\0b", "a\nb", "a\x1b[2Jb"]
HOSTILE_IN_URLS = [*HOSTILE, "a?versionId=x"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder deep inside the test's own folder. Everything around it must stay unchanged."""
    folder = tmp_path / "outer/middle/inner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ECAR_CACHE_DIR", str(tmp_path / "outer/cache"))
    return folder


def everything_under(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(act) -> str:
    with pytest.raises(DataError) as error:
        act()
    said = str(error.value)
    assert said.isprintable(), ascii(said)
    return said


def latents_with(folder: Path, **changes: object) -> Path:
    """A set of latents whose first entry or list of failures was changed, with a matching id."""
    folder.mkdir()
    write_set(folder)
    manifest = load_manifest(folder)
    if "failures" in changes:
        write_unchecked(folder, dataclasses.replace(manifest, **changes))
        return folder
    entries = [dataclasses.replace(manifest.shards[0], **changes), *manifest.shards[1:]]
    write_unchecked(folder, dataclasses.replace(manifest, shards=entries))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_latents_of_a_folder(place, name):
    for field in ({"name": name}, {"failures": {"count": 1, "file": name}}):
        folder = latents_with(place / "set", **field)
        before = everything_under(place.parents[1])
        refused(lambda folder=folder: LatentSource(folder))
        assert everything_under(place.parents[1]) == before
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_images_of_a_folder(place, name):
    for field in ({"name": name}, {"table": name}, {"key": name}):
        if field == {"key": ""} or "\0" in field.get("key", "") or field == {"location": ""}:
            continue  # numpy's strings cannot hold them
        folder = write_class_directory(place / "set", **field)
        before = everything_under(place.parents[1])
        refused(lambda folder=folder: ImageShards(folder).read_many([0]))
        assert everything_under(place.parents[1]) == before
        shutil.rmtree(folder)


@pytest.mark.parametrize("location", ["a\0b", "a\nb", "a\x1b[2Jb"])
def test_a_place_of_images_that_cannot_be_printed(place, location):
    folder = write_class_directory(place / "set", location=location)
    refused(lambda: ImageShards(folder))


@pytest.mark.parametrize("name", HOSTILE_IN_URLS)
def test_latents_of_a_bucket_and_its_cache(place, object_store, name):
    folder = latents_with(place / "set", name=name)
    object_store.put("set/manifest.json", (folder / "manifest.json").read_bytes())
    object_store.put("x", b"secret")
    before = everything_under(place.parents[1])
    refused(lambda: read_all(f"{object_store.url}/set", place.parents[1] / "cache"))
    after = everything_under(place.parents[1])
    assert {path: content for path, content in after.items() if not path.startswith("cache")} == before
    assert [content for path, content in after.items() if path.startswith("cache") and content] == []


def read_all(url: str, cache: Path) -> None:
    source = LatentSource(url, CacheOptions(root=cache, retry=QUICK))
    try:
        stream = SampleStream([source.shard_counts], seed=0, global_batch_size=97)
        source.read(stream.locate(rank_positions(0, 97, 0, 1)), None)
    finally:
        source.close()


@pytest.mark.parametrize("name", HOSTILE_IN_URLS)
def test_images_of_a_bucket(place, object_store, name):
    for field in ({"name": name}, {"table": name}, {"key": name}):
        if field == {"key": ""} or "\0" in field.get("key", ""):
            continue
        folder = write_class_directory(place / "set", **field)
        for path in ("manifest.json", "000000.npy", "class/a.jpg"):
            object_store.put(f"set/{path}", (folder / path).read_bytes())
        before = everything_under(place.parents[1])
        refused(lambda: ImageShards(f"{object_store.url}/set").read_many([0]))
        assert everything_under(place.parents[1]) == before
        shutil.rmtree(folder)


def test_images_of_a_bucket_are_not_on_this_machine(place, object_store):
    """An index may state where its images are. One from a URL may not name a folder on the reader's machine."""
    folder = write_class_directory(place / "set", location=str(place / "private"))
    shutil.copytree(folder / "class", place / "private/class")
    for path in ("manifest.json", "000000.npy"):
        object_store.put(f"set/{path}", (folder / path).read_bytes())
    assert ImageShards(folder).read(0).label == 0
    refused(lambda: ImageShards(f"{object_store.url}/set").read_many([0]))


@pytest.mark.parametrize("name", HOSTILE)
def test_push_sends_nothing_from_elsewhere(place, object_store, capsys, name):
    (place.parent / "x").write_text("secret")
    for number, field in enumerate(({"name": name}, {"failures": {"count": 1, "file": name}})):
        folder = latents_with(place / f"set{number}", **field)
        before = everything_under(place.parents[1])
        assert main(["push", str(folder), f"{object_store.url}/sent"]) == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert said.strip().isprintable()
        assert everything_under(place.parents[1]) == before
        assert list_files(object_store.url) == []


@pytest.mark.parametrize("verb", ["verify", "stats", "preview"])
def test_the_commands_for_a_set_reject_it_in_one_line(place, capsys, verb):
    folder = latents_with(place / "set", name="../../x")
    assert main([verb, str(folder), *(["--out", "sheet.png"] if verb == "preview" else [])]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said


def test_names_in_a_table_of_tars_are_printed_as_they_are(place):
    """A key of a tar is never used as a path, but it appears in messages and lists."""
    tar = {"kind": "tar", "name": "000000.tar", "bytes": 10_240, "xxh3_128": "0" * 32, "sha256": "0" * 64}
    folder = write_class_directory(place / "set", key="a\x1b[2Jb", **tar)
    (folder / "000000.tar").write_bytes((folder / "class/a.jpg").read_bytes().ljust(10_240, b"\0"))
    said = refused(lambda: ImageShards(folder).read_many([0]))
    assert "000000.npy" in said


@pytest.mark.parametrize("name", HOSTILE)
def test_join_is_for_names_that_stay(place, name):
    for folder in (place, str(place), f"file://{place}", "s3://bucket/set", "https://host/set?sig=x"):
        said = refused(lambda folder=folder: join(folder, name))
        assert "sig" not in said


@pytest.mark.parametrize("name", ["a?b", "%2e%2e/b", "..%2fb", "a%0ab", "a#b"])
def test_join_in_a_url_of_the_web(name):
    refused(lambda: join("https://host/set", name))
    refused(lambda: join("http://host/set", name))


def test_join_takes_the_names_that_stores_have():
    assert join("s3://bucket/set/", "C#/50% off.jpg") == "s3://bucket/set/C#/50% off.jpg"
    assert join("/set", "a?b") == "/set/a?b"
    assert join("https://host/set?sig=x", "n%20a/b.jpg") == "https://host/set/n%20a/b.jpg?sig=x"
    refused(lambda: join("s3://bucket/set", "a?b"))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x7fb"])
def test_names_in_tars_and_folders(place, capsys, name):
    source = place / "source"
    (source / "class").mkdir(parents=True)
    (source / f"class/{name}.png").write_bytes(encoded(0, "PNG"))
    tars = place / "tars"
    tars.mkdir()
    write_tar(tars / "a.tar", members_of([(name, encoded(0), 0)]))
    (place / "shards").mkdir()
    (place / "shards" / f"{name}.tar").write_bytes((tars / "a.tar").read_bytes())
    before = everything_under(place.parents[1])
    for folder in (source, tars, place / "shards"):
        for verb in ("index", "shard"):
            assert main([verb, str(folder), "out"]) == 1
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("ecar-data: "), said
            assert said.isprintable()
    assert everything_under(place.parents[1]) == before


def test_a_tar_member_that_leads_out_is_a_key_and_not_a_path(place):
    tars = place / "tars"
    tars.mkdir()
    write_tar(tars / "a.tar", members_of([("../../x", encoded(0), 1), ("/etc/x", encoded(1), 2)]))
    before = everything_under(place.parent)
    assert main(["shard", str(tars), str(place / "out")]) == 0
    assert everything_under(place.parent).keys() - before.keys() == {
        f"inner/out{name}"
        for name in ("", "/000000.tar", "/000000.idx", "/000000.npy", "/000000.names", "/manifest.json")
    }
    assert main(["index", str(tars), str(place / "index")]) == 0
    assert ImageShards(place / "index").read(0).label == 1


def test_names_that_people_give(place):
    """Files may have such names, and are read: macOS spaces, joined emoji, bytes that are not UTF-8."""
    (place / "source/a class").mkdir(parents=True)
    for name in ("Screenshot 3.04\u202fPM", "\U0001f469\u200d\U0001f467", os.fsdecode(b"\xff")):
        (place / f"source/a class/{name}.png").write_bytes(encoded(0, "PNG"))
    assert main(["index", str(place / "source"), str(place / "out")]) == 0
    assert len(ImageShards(place / "out").read_many([0, 1, 2])) == 3
