"""Damage to a tar, in a store or in transit: each kind for image tars, latent shards and plain webdataset.

webdataset is included to show the difference, not as a rule: it silently reads a smaller set, or wrong bytes.
"""

import os
import shutil

import pytest
import webdataset

from data_tools.images.index import index
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_image_manifest, load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.data.shards.store import LocalShards
from ecar_dist.data.shards.tar_index import index_tar
from ecar_dist.errors import DataError
from tests.data.image_sets import members_of, samples, write_tar
from tests.data.latent_sets import write_set

PER_TAR = 20
VICTIM = 1  # the shard that is damaged


class ImageSet:
    """Three image tars and their index."""

    def __init__(self, root):
        self.folder = root / "tars"
        self.folder.mkdir(parents=True)
        self.content = samples(3 * PER_TAR)
        for place in range(3):
            rows = self.content[place * PER_TAR : (place + 1) * PER_TAR]
            write_tar(self.folder / f"{place:06d}.tar", members_of(rows))
        self.index = root / "index"
        index(str(self.folder), self.index)

    def read_through_store(self):
        """Like training: complete tars, proven when they are opened."""
        manifest = load_image_manifest(self.index)
        shards = ImageShards(self.index, LocalShards(self.folder, manifest.shards))
        return shards.read_many(range(len(shards)))


class LatentSet:
    def __init__(self, root):
        self.folder = root
        root.mkdir(parents=True)
        write_set(root)

    def read_through_store(self):
        manifest = load_manifest(self.folder)
        return [open_latent_shard(self.folder / entry.name, entry, manifest) for entry in manifest.shards]


def members(path):
    return index_tar(path)


def cut(path, at):
    os.truncate(path, at)


def change(path, at, new):
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


def flip(path, at):
    change(path, at, bytes([path.read_bytes()[at] ^ 1]))


def payload(path, number=8):
    return members(path)[number].offset


def swap(path):
    """Swap two shards of a set."""
    other = path.with_name("000000.tar")
    shutil.move(path, path.with_suffix(".x"))
    shutil.move(other, path)
    shutil.move(path.with_suffix(".x"), other)


def stale(path):
    """What a cache keyed by base name returns: another set's shard with the same name and size."""
    change(path, payload(path), bytes(members(path)[8].size))


DAMAGES = {
    "cut on a member boundary": lambda path: cut(path, payload(path) - 512),
    "cut inside a header": lambda path: cut(path, payload(path) - 200),
    "cut inside a payload": lambda path: cut(path, payload(path) + 5),
    "no end of archive": lambda path: cut(path, members(path)[-1].offset + 512),  # the last member fills one block
    "one flipped header byte": lambda path: flip(path, payload(path) - 512 + 3),
    "a zeroed header": lambda path: change(path, payload(path) - 512, bytes(512)),
    "a flipped payload byte": lambda path: flip(path, payload(path) + 140),
    "a flipped byte of padding": lambda path: flip(path, members(path)[9].offset + 400),
    "two shards exchanged": swap,
    "another set's shard of that name": stale,
    "an empty file": lambda path: cut(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", [ImageSet, LatentSet])
@pytest.mark.parametrize("name", DAMAGES)
def test_each_kind_of_damage_raises_with_the_shards_name(tmp_path, name, kind):
    data_set = kind(tmp_path / "set")
    data_set.read_through_store()
    DAMAGES[name](data_set.folder / f"{VICTIM:06d}.tar")
    with pytest.raises(
        DataError, match=r"00000[01]\.tar" if name == "two shards exchanged" else r"000001\.tar"
    ) as caught:
        data_set.read_through_store()
    assert "\n" not in str(caught.value)


# An image that is read directly through the table is correct or rejected. Bytes outside images may differ.
HARMLESS_TO_IMAGES = {"one flipped header byte", "a zeroed header", "a flipped byte of padding"}


@pytest.mark.parametrize("name", DAMAGES)
def test_images_read_one_by_one_are_right_or_refused(tmp_path, name):
    data_set = ImageSet(tmp_path)
    DAMAGES[name](data_set.folder / f"{VICTIM:06d}.tar")
    try:
        shards = ImageShards(data_set.index)
        records = shards.read_many(range(len(shards)))
    except DataError as error:
        assert name not in HARMLESS_TO_IMAGES
        assert "00000" in str(error)  # noqa: PT017
    else:
        assert name in HARMLESS_TO_IMAGES
        assert [(record.key, record.data, record.label) for record in records] == data_set.content


SEEN_WHEN_INDEXED = {  # damage to the archive; a tar with only a different payload is valid
    "cut on a member boundary",
    "cut inside a header",
    "cut inside a payload",
    "no end of archive",
    "one flipped header byte",
    "a zeroed header",
    "an empty file",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_foreign_tar_is_not_indexed(tmp_path, name):
    data_set = ImageSet(tmp_path)
    path = data_set.folder / f"{VICTIM:06d}.tar"
    DAMAGES[name](path)
    if name in SEEN_WHEN_INDEXED:
        with pytest.raises(DataError, match=r"000001\.tar"):
            index(str(data_set.folder), tmp_path / "again")
    elif path.exists():
        index(str(data_set.folder), tmp_path / "again")
        again, before = (load_image_manifest(tmp_path / folder) for folder in ("again", "index"))
        assert again.dataset_id != before.dataset_id


# How many of 60 samples webdataset yields, or its exception. 44 is silent loss; 60 is complete, or has wrong bytes.
WEBDATASET = {
    "cut on a member boundary": 44,
    "cut inside a header": 44,
    "cut inside a payload": "ReadError",
    "no end of archive": 60,
    "one flipped header byte": 44,
    "a zeroed header": 44,
    "a flipped payload byte": 60,
    "a flipped byte of padding": 60,
    "two shards exchanged": 60,
    "another set's shard of that name": 60,
    "an empty file": "ReadError",
    "gone": "FileNotFoundError",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_webdataset_does_with_the_same_tars(tmp_path, name):
    data_set = ImageSet(tmp_path)
    DAMAGES[name](data_set.folder / f"{VICTIM:06d}.tar")
    urls = [str(data_set.folder / f"{place:06d}.tar") for place in range(3)]
    try:
        seen = list(webdataset.WebDataset(urls, shardshuffle=False))
    except Exception as error:
        assert type(error).__name__ == WEBDATASET[name]  # noqa: PT017
    else:
        assert len(seen) == WEBDATASET[name]
