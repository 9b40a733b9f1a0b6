import json
import os

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from data_tools.shard import shard
from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.images import open_decoder
from ecar_dist.data.manifest import ImageManifest, write_manifest
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.errors import DataError


@pytest.fixture
def folder(tmp_path):
    shard("digits", tmp_path / "images", samples_per_shard=700)
    return tmp_path / "images"


def test_random_access(folder):
    shards, digits, decoder = ImageShards(folder), load_digits(), open_decoder("pil")
    assert len(shards) == 1797
    assert [entry.count for entry in shards.manifest.shards] == [700, 700, 397]
    for index in (0, 699, 700, 1400, 1796):
        record = shards.read(index)
        pixels = decoder.decode([record.data], [record.where])[0]
        assert np.array_equal(pixels[..., 0], np.round(digits.images[index] * 255 / 16))
        assert (record.label, record.key) == (digits.target[index], f"{index:012d}")


def write_one_shard(folder, samples):
    with webdataset.TarWriter(str(folder / "000000.tar"), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    entry = describe_shard(folder / "000000.tar", 2, 0)
    write_manifest(folder, ImageManifest("test", 2, 10, [str(label) for label in range(10)], [entry]))


GOOD = {"__key__": "a", "png": b"x", "cls": b"1"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"__key__": "b", "png": b"x"}, "sample b has parts"),
        ({"__key__": "b", "cls": b"1"}, "sample b has parts"),
        ({"__key__": "b", "png": b"x", "cls": b"10"}, "label b'10' of b is not in 0..9"),
        ({"__key__": "b", "png": b"x", "cls": b"one"}, "label b'one' of b is not in 0..9"),
        (None, "holds 1 samples, the manifest says 2"),
    ],
)
def test_bad_samples_are_named(tmp_path, second, message):
    write_one_shard(tmp_path, [GOOD, second] if second else [GOOD])
    with pytest.raises(DataError, match=message):
        ImageShards(tmp_path).read(1)


def test_damage_is_found(folder):
    path = folder / "000001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000001\.tar has xxh3_128"):
        ImageShards(folder).read(700)
    os.truncate(path, 1024)
    with pytest.raises(DataError, match=r"000001\.tar has 1024 bytes"):
        ImageShards(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read shard .*000001\.tar"):
        ImageShards(folder)


def test_webdataset_reads_them_too(folder):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    digits = load_digits()
    assert [sample["cls"] for sample in samples] == digits.target.tolist()
    assert np.array_equal(samples[7]["png"], np.round(digits.images[7] * 255 / 16))
    assert json.loads((folder / "manifest.json").read_text())["schema"] == "ecar-images-v1"
