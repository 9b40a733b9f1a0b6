import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from data_tools import push as push_module
from data_tools.push import push
from ecar_dist.data.shards.manifest import load_image_manifest, load_manifest, write_manifest
from ecar_dist.data.shards.store import CacheOptions, open_store
from ecar_dist.errors import DataError
from ecar_dist.storage.remote import list_files, stat
from ecar_dist.storage.retries import Transfer
from tests.data.latent_sets import write_set
from tests.data.object_store import QUICK, object_store, s3_server

__all__ = ["object_store", "s3_server"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set")
    (tmp_path / "set" / "not-of-the-set.txt").touch()
    return tmp_path / "set"


@pytest.fixture
def url(object_store):
    return f"{object_store.url}/pushed"


def send(folder, url):
    push(folder, url, threads=2, transfer=Transfer(QUICK))


def puts(object_store):
    return [entry["path"].partition("?")[0].rpartition("/")[2] for entry in object_store.log("PUT")]


def test_what_was_pushed_streams_back(folder, url, object_store, capsys):
    send(folder, url)
    files = len(list(folder.iterdir())) - 1
    said = f"{url}: {files} files, {{}} sent, dataset_id {load_manifest(folder).dataset_id}\n"
    assert capsys.readouterr().out == said.format(files)
    send(folder, url)
    assert capsys.readouterr().out == said.format(0)
    assert puts(object_store)[-1] == "manifest.json"
    manifest = load_manifest(url)
    assert manifest == load_manifest(folder)
    store = open_store(url, manifest.dataset_id, manifest.shards, CacheOptions(retry=QUICK))
    for index, entry in enumerate(manifest.shards):
        assert store.open(index)[:] == (folder / entry.name).read_bytes()
    store.close()
    sent = {name for name, _ in list_files(url)}
    assert sent == {path.name for path in folder.iterdir()} - {"not-of-the-set.txt"}


def test_a_failed_push_leaves_no_manifest_and_resumes(folder, url, object_store):
    object_store.break_on({"kind": "status", "status": 403, "match": "000001.tar", "method": "PUT", "times": None})
    with pytest.raises(DataError, match=r"writing s3://.*/000001\.tar failed at once: HTTP 403"):
        send(folder, url)
    kept = {name for name, _ in list_files(url)}
    assert "manifest.json" not in kept
    object_store.break_on()
    send(folder, url)
    assert not kept & set(puts(object_store)), "files in the store are sent again"
    assert load_manifest(url) == load_manifest(folder)


def test_a_killed_push_leaves_no_manifest(folder, url, object_store):
    object_store.break_on({"kind": "stall", "match": "000001.tar", "method": "PUT", "times": None})
    script = f"from pathlib import Path; from data_tools.push import push; push(Path({str(folder)!r}), {url!r})"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not object_store.log("PUT", "000001.tar"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert "manifest.json" not in {name for name, _ in list_files(url)}
    object_store.break_on()
    send(folder, url)
    assert load_manifest(url) == load_manifest(folder)


def test_a_changed_file_of_the_same_size_is_sent_again(folder, url, object_store):
    send(folder, url)
    other = bytearray((folder / "000001.tar").read_bytes())
    other[600] ^= 1
    object_store.put("pushed/000001.tar", bytes(other))
    object_store.break_on()
    send(folder, url)
    assert puts(object_store) == ["000001.tar"]


def test_passing_faults_do_not_matter(folder, url, object_store):
    object_store.break_on(
        {"kind": "status", "status": 503, "method": "PUT", "times": 3}, {"kind": "reset", "at": 0, "method": "HEAD"}
    )
    send(folder, url)
    assert load_manifest(url) == load_manifest(folder)


def test_another_set_is_not_overwritten(folder, url, object_store, tmp_path):
    send(folder, url)
    (tmp_path / "other").mkdir()
    write_set(tmp_path / "other", flip=True)
    object_store.break_on()
    with pytest.raises(DataError, match=r"pushed has data set \w+, not \w+; push to another URL"):
        send(tmp_path / "other", url)
    assert puts(object_store) == []


def test_a_damaged_set_is_not_sent(folder, url, object_store):
    data = bytearray((folder / "000001.tar").read_bytes())
    data[600] ^= 1
    (folder / "000001.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"000001\.tar has xxh3_128"):
        send(folder, url)
    assert "manifest.json" not in puts(object_store)
    with pytest.raises(DataError, match=str(folder)):
        send(folder, str(folder))


def test_parts_are_proven_by_their_md5s(folder, url, object_store, monkeypatch, tmp_path):
    """S3's ETag of an upload in parts is the MD5 of the parts' MD5s; the part size is guessed from the usual ones."""
    from ecar_dist.storage import remote

    (tmp_path / "large").write_bytes(os.urandom(5 << 20) * 2 + b"rest")
    path = remote._RemotePath(f"{url}/large")
    path.call("put_file", 60, before=(str(tmp_path / "large"),), chunksize=5 << 20)
    version = stat(f"{url}/large")
    assert version.tag.strip('"').endswith("-3")
    assert push_module._same_bytes(tmp_path / "large", version) is True
    with open(tmp_path / "large", "r+b") as file:
        file.seek(7 << 20)
        file.write(b"x")
    assert push_module._same_bytes(tmp_path / "large", version) is None


def test_an_index_of_images_elsewhere_is_not_sent(digits, url, tmp_path):
    manifest = load_image_manifest(digits / "images/heldout")
    write_manifest(tmp_path, dataclasses.replace(manifest, location="s3://elsewhere/images"))
    with pytest.raises(DataError, match=r"is an index of s3://elsewhere/images, .*ecar-data shard"):
        send(tmp_path, url)


def test_image_sets_go_too(digits, url):
    send(digits / "images/heldout", url)
    there, here = load_image_manifest(url), load_image_manifest(digits / "images/heldout")
    assert there.dataset_id == here.dataset_id
    assert {entry.name for entry in here.shards} | {entry.table for entry in here.shards} <= {
        name for name, _ in list_files(url)
    }
