"""The entries of a large set: a table next to the manifest, read row by row."""

import dataclasses
import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import xxhash

from ecar_dist.data.shards import entries as module
from ecar_dist.data.shards.entries import TABLE_NAME, LatentEntry, ShardTable, write_table
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_manifest, write_manifest
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import LatentSource
from ecar_dist.errors import DataError
from ecar_dist.storage.untrusted import UntrustedError
from tests.data.latent_sets import COUNTS, write_set
from tests.data.object_store import object_store, s3_server

__all__ = ["object_store", "s3_server"]


@pytest.fixture
def folder(tmp_path):
    """The small set with a table, and with gaps in the rows of its second shard."""
    write_set(tmp_path)
    with_table(tmp_path)
    return tmp_path


def with_table(folder):
    manifest = load_manifest(folder)
    record = write_table(folder, manifest.shards, len(manifest.shards), 10)
    write_manifest(folder, dataclasses.replace(manifest, shards=ShardTable(folder / TABLE_NAME, record)))


def made_entries(rng):
    """A random valid list."""
    shards, first, row = [], 0, 0
    names = sorted({rng.choice(["", "a/", "0/b-"]) + f"{rng.randrange(10**6)}.tar" for _ in range(rng.randint(1, 9))})
    for name in sorted(names, key=lambda name: (len(name), name)):
        count, gaps = rng.randint(1, 5), rng.choice([0, 0, 1, 3])
        row += rng.choice([0, 0, 7])
        missing = tuple(sorted(rng.sample(range(row, row + count + gaps), gaps)))
        hashes = (f"{rng.getrandbits(128):032x}", f"{rng.getrandbits(256):064x}")
        shards.append(LatentEntry(name, count * 1024 + rng.randrange(9), count, first, *hashes, row, missing))
        first += count
        row += count + gaps
    return shards


def test_any_list_of_shards_comes_back(tmp_path, monkeypatch):
    """A thousand lists, in pieces of all sizes."""
    rng = random.Random(0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for case in range(1000):
        monkeypatch.setattr(module, "_CHUNK", rng.choice([1, 2, 5, 64]))
        shards = made_entries(rng)
        record = write_table(tmp_path, iter(shards), len(shards), 20)
        table = ShardTable(tmp_path / TABLE_NAME, record)
        assert list(table) == shards == table[:], case
        assert [table[index] for index in range(len(table))] == shards
        assert table.counts.tolist() == [entry.count for entry in shards]
        assert table.samples == sum(entry.count for entry in shards)
        assert [table.find(entry.name) for entry in shards] == list(range(len(shards)))
        assert table.find(rng.choice(["", "0.tar", "zz/9999999.tar", shards[0].name + "x"])) is None
    assert table[-1] == shards[-1]
    with pytest.raises(IndexError):
        table[len(shards)]


def test_numpy_reads_it(folder):
    rows = np.load(folder / TABLE_NAME, mmap_mode="r")
    assert rows["count"].tolist() == list(COUNTS)
    assert rows["name"].tolist() == [b"000000.tar", b"000001.tar", b"000002.tar"]


def test_a_set_with_a_table_is_read_like_one_without(folder, tmp_path):
    listed = tmp_path / "listed"
    listed.mkdir()
    moments, labels = write_set(listed)
    source = LatentSource(folder)
    assert list(source.manifest.shards) == load_manifest(listed).shards
    assert source.manifest.counts.tolist() == list(COUNTS)
    assert json.loads((folder / MANIFEST_NAME).read_text())["schema"] == "ecar-latents-v2"
    shard = source.store.open(1)
    assert np.array_equal(shard.moments, moments[40:80])
    assert np.array_equal(shard.labels, labels[40:80])
    assert load_manifest(folder) == source.manifest
    source.close()


def test_a_copy_takes_its_table_along(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    write_manifest(tmp_path / "copy", load_manifest(folder))
    assert load_manifest(tmp_path / "copy") == load_manifest(folder)


def restate(folder, change=lambda rows, missing: None, **record):
    """Edit the table like an attacker who can also recompute all hashes."""
    tree = json.loads((folder / MANIFEST_NAME).read_text())
    with open(folder / TABLE_NAME, "rb") as file:
        arrays = [np.load(file), np.load(file)]
    change(*arrays)
    with open(folder / TABLE_NAME, "wb") as file:
        for array in arrays:
            np.lib.format.write_array(file, array, version=(1, 0))
    content = (folder / TABLE_NAME).read_bytes()
    hashes = {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "sha256": hashlib.sha256(content).hexdigest()}
    tree["table"] |= {"bytes": len(content), **hashes, **record}
    del tree["dataset_id"]
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    tree["dataset_id"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))


def put(field, place, value):
    def change(rows, missing):
        rows[field][place] = value

    return change


HOSTILE = {
    "a name that leads out": put("name", 0, b"../x.tar"),
    "an absolute name": put("name", 0, b"/etc/x.tar"),
    "a hidden name": put("name", 0, b".x.tar"),
    "a folder for a name": put("name", 0, b"000000/"),
    "an empty part": put("name", 0, b"00//00.tar"),
    "a name with a newline": put("name", 0, b"0000\n0.tar"),
    "a name with a zero inside": put("name", 0, b"000\x000.tar"),
    "no name": put("name", 0, b""),
    "one name twice": put("name", 1, b"000000.tar"),
    "names that fall": put("name", 2, b"0.tar"),
    "a negative count": put("count", 0, -3),
    "a count of nothing": put("count", 0, 0),
    "a count whose sum overflows": put("count", 1, 2**63 - 1),
    "a count for which the file has no room": put("bytes", 0, 1024),
    "a negative size": put("bytes", 0, -1),
    "an absurd size": put("bytes", 0, 2**62),
    "a first index with a gap": put("first_index", 1, 41),
    "a row below zero": put("first_row", 0, -1),
    "a row whose sum overflows": put("first_row", 2, 2**63 - 2),
    "rows of two shards overlap": put("first_row", 1, 3),
    "gaps that are not there": put("missing", 1, 2),
    "gaps below zero": put("missing", 1, -1),
    "gaps elsewhere": put("missing_at", 1, 5),
}
RECORDS = {
    "another number of shards": {"shards": 2},
    "no shards": {"shards": 0},
    "more missing rows than there are": {"missing": 4},
    "longer names": {"name_bytes": 11},
    "another size": {"bytes": 12},
    "an absurd size": {"bytes": 1 << 40},
    "another hash": {"sha256": "0" * 64},
    "a hash that is none": {"sha256": "x"},
    "a field that nobody knows": {"more": 1},
}


def test_what_breaks_a_rule_is_refused_even_with_the_right_hashes(folder, tmp_path):
    cases = {**{name: (change, {}) for name, change in HOSTILE.items()}}
    cases |= {name: (lambda rows, missing: None, record) for name, record in RECORDS.items()}
    for name, (change, record) in cases.items():
        other = tmp_path / "other"
        shutil.copytree(folder, other, ignore=lambda *_: ["other"])
        restate(other, change, **record)
        with pytest.raises(DataError) as caught:
            load_manifest(other)
        assert str(caught.value).isprintable(), name
        assert "dataset_id" not in str(caught.value), name
        shutil.rmtree(other)
    restate(folder)
    load_manifest(folder)


def test_missing_rows_ascend_within_their_shard(tmp_path):
    entry = LatentEntry("0.tar", 4096, 2, 0, "0" * 32, "0" * 64, 10, (11, 12))
    for missing in ((12, 11), (11, 11), (9, 11), (11, 14)):
        record = write_table(tmp_path, [dataclasses.replace(entry, missing=missing)], 1, 5)
        with pytest.raises(UntrustedError, match=r"shard 0 .*missing"):
            ShardTable(tmp_path / TABLE_NAME, record)


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "pipe", "total", "head"])
def test_damage_is_one_line(folder, damage):
    path = folder / TABLE_NAME
    if damage == "cut":
        os.truncate(path, 200)
    elif damage == "bit":
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    elif damage in ("gone", "pipe"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
    else:
        field, value = ("count", 98) if damage == "total" else ("num_classes", 11)
        text = (folder / MANIFEST_NAME).read_text()
        (folder / MANIFEST_NAME).write_text(text.replace(f'"{field}": {value - 1}', f'"{field}": {value}'))
    with pytest.raises(DataError, match="dataset_id" if damage in ("total", "head") else TABLE_NAME) as caught:
        load_manifest(folder)
    assert str(caught.value).isprintable()


def test_a_table_that_is_cut_while_it_is_used(folder):
    table = load_manifest(folder).shards
    os.truncate(folder / TABLE_NAME, 200)
    with pytest.raises(DataError, match="cut"):
        table[2]


def test_a_table_that_is_replaced_while_it_is_used(folder):
    table = load_manifest(folder).shards
    before = list(table)
    (folder / "new").write_bytes(bytes(1000))
    os.replace(folder / "new", folder / TABLE_NAME)
    assert list(table) == before


def test_behind_a_url_a_node_fetches_it_once(folder, object_store, tmp_path):
    url, cache = object_store.put_folder(folder, "set/"), tmp_path / "cache"
    for _ in range(2):
        assert load_manifest(url, cache) == load_manifest(folder)
    assert len(object_store.log(match=TABLE_NAME)) == 1

    # A damaged cached file is downloaded again, and the shards are read through the cache as well.
    (cached,) = (cache / "tables").iterdir()
    cached.write_bytes(bytes(cached.stat().st_size))
    source = LatentSource(url, CacheOptions(root=cache))
    assert np.array_equal(source.store.open(2).labels, LatentSource(folder).store.open(2).labels)
    source.close()
