import itertools
import os

import fsspec
import numpy as np
import pytest
import torch

from data_tools.images.index import index
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.loader import SampleLoader, Share
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import ImageSource
from ecar_dist.errors import DataError
from ecar_dist.rng import Purpose, uniform
from tests.data.image_sets import members_of, samples, write_tar
from tests.data.process import wait_until

SIZE, SEED = 32, 3


def write_set_with_a_bad_image(folder):
    """40 images in one tar, indexed in folder/index. Number 7 is garbage after the first bytes of a JPEG."""
    content = samples(40)
    content[7] = ("000007", b"\xff\xd8\xff\xe0 and nothing more", 7)
    (folder / "tars").mkdir()
    write_tar(folder / "tars/0.tar", members_of(content))
    index(str(folder / "tars"), folder / "index")
    return folder / "index"


def open_loader(folder, *, decoder="pil", flip=False, rank=0, world_size=1, **options):
    counts = [entry.count for entry in load_image_manifest(folder).shards]
    stream = SampleStream([counts], seed=SEED, global_batch_size=8)
    source = ImageSource(folder, open_decoder(decoder), SIZE, flip=flip)
    return SampleLoader([source], stream, Share(8, 4, rank, world_size), seed=SEED, **options)


def read(folder, batches, **options):
    with open_loader(folder, **options) as loader:
        return list(itertools.islice(loader, batches))


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_pixels_and_labels_are_those_of_the_images_in_order(digits, decoder):
    folder = digits / "images/train"
    images = ImageShards(folder)
    for batch in read(folder, 3, decoder=decoder):
        assert batch.values.dtype == torch.uint8
        assert batch.values.shape == (4, SIZE, SIZE, 3)
        records = images.read_many(batch.sample_ids.tolist())
        wanted = open_decoder(decoder).decode_to_batch([r.data for r in records], [r.where for r in records], SIZE)
        np.testing.assert_array_equal(batch.values.numpy(), wanted)
        assert batch.labels.tolist() == [record.label for record in records]


def test_flips_are_keyed_by_position(digits):
    folder = digits / "images/train"
    straight, flipped = read(folder, 8), read(folder, 8, flip=True)
    mirrored = []
    for plain, maybe in zip(straight, flipped, strict=True):
        assert plain.sample_ids.tolist() == maybe.sample_ids.tolist()
        for one, other in zip(plain.values, maybe.values, strict=True):
            mirrored.append(bool((one != other).any()))
            assert torch.equal(other, one.flip(1) if mirrored[-1] else one)
    positions = torch.cat([batch.positions for batch in flipped])
    assert mirrored == (uniform(SEED, positions, Purpose.FLIP) < 0.5).tolist()
    assert 4 < sum(mirrored) < 28


def test_a_bad_image_ends_the_run_or_is_replaced_as_asked(tmp_path):
    folder = write_set_with_a_bad_image(tmp_path)
    with pytest.raises(DataError, match="000007"):
        read(folder, 20)
    with open_loader(folder, max_bad=0.03) as loader:
        batches = list(itertools.islice(loader, 20))  # two epochs
    made = [one for batch in batches for one in batch.substitutions]
    assert [one.sample_id for one in made] == [7, 7]
    assert 7 not in torch.cat([batch.sample_ids for batch in batches])
    again = read(folder, 20, max_bad=0.03)
    assert all(torch.equal(one.values, other.values) for one, other in zip(batches, again, strict=True))
    with pytest.raises(DataError, match=" 1 of 40 "):
        read(folder, 20, max_bad=0.02)


@pytest.fixture
def in_memory(tmp_path):
    """40 images in two tars and in ten class directories, behind memory:// URLs; their indices in tmp_path."""
    store = fsspec.filesystem("memory")
    for number in range(2):
        tar = write_tar(tmp_path / "one.tar", members_of(samples(20, first=20 * number)))
        store.pipe(f"/set/tars/{number}.tar", tar.read_bytes())
    for key, data, label in samples(40):
        store.pipe(f"/set/classes/{label}/{key}.jpg", data)
    for kind in ("tars", "classes"):
        index(f"memory://set/{kind}", tmp_path / kind)
    yield store
    store.rm("/set", recursive=True)


def test_tars_behind_a_url_come_through_the_nodes_cache(in_memory, tmp_path):
    manifest = load_image_manifest(tmp_path / "tars")
    sizes, kept = [entry.bytes for entry in manifest.shards], tmp_path / "cache" / manifest.dataset_id
    cache = CacheOptions(tmp_path / "cache", budget_bytes=max(sizes))
    source = ImageSource(tmp_path / "tars", open_decoder("pil"), SIZE, flip=False, cache=cache)
    places = SampleStream([[20, 20]], seed=SEED, global_batch_size=8).locate(np.arange(40))
    source.plan([0], {0: 0, 1: 1})
    wait_until(lambda: os.listdir(kept) == ["0.tar"])
    pixels, labels = source.read(places.take(np.flatnonzero(places.shards == 0)), None)
    assert len(pixels) == len(labels) == 20
    assert source.traffic()["bytes"] == sizes[0]
    source.plan([1], {1: 0, 0: 1})
    assert set(source._images._maps) == {0}, "its next use is near enough"
    wait_until(lambda: os.listdir(kept) == ["1.tar"])
    source.plan([1], {1: 0})
    assert not source._images._maps
    assert not source._images._tables
    source.close()
    with pytest.raises(DataError, match="stopped"):
        source.read(places.take(np.flatnonzero(places.shards == 0)), None)


def test_images_that_are_files_of_their_own_are_read_where_they_are(in_memory, tmp_path):
    counts = [entry.count for entry in load_image_manifest(tmp_path / "classes").shards]
    source = ImageSource(tmp_path / "classes", open_decoder("pil"), SIZE, flip=False)
    places = SampleStream([counts], seed=SEED, global_batch_size=8).locate(np.arange(12))
    source.plan([0, 1], {0: 0, 1: 1})
    pixels, labels = source.read(places, None)
    assert pixels.shape == (12, SIZE, SIZE, 3)
    assert labels.tolist() == places.shards.tolist()
    sizes = [len(data) for key, data, label in samples(40)]
    assert source.traffic()["bytes"] > 12 * min(sizes)
    source.close()
    with pytest.raises(DataError, match="stopped"):
        source.read(places, None)
