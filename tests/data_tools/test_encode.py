import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch

from data_tools import encode as encode_module
from data_tools.encode_plan import read_plan
from data_tools.finalize import finalize
from ecar_dist.data import shard_writer
from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.images import open_decoder
from ecar_dist.data.manifest import load_manifest, write_manifest
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.data.shards import LatentShard
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.dct import DctCodec
from ecar_dist.vae.pixels import from_pixels
from tests.data_tools.image_folders import content, encode_small, write_image_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """One task from start to end."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    encode_small(images, out)
    finalize(out)
    return out


def rows_of(folder):
    manifest = load_manifest(folder)
    shards = [LatentShard(folder / entry.name, entry, manifest) for entry in manifest.shards]
    return [np.concatenate([getattr(shard, name) for shard in shards]) for name in ("moments", "labels")]


def test_rows_are_the_shuffled_source(images, whole):
    source, plan, decoder = ImageShards(images), read_plan(whole), open_decoder("pil")
    order = np.concatenate([plan.source_indices(index) for index in range(plan.num_shards)])
    assert sorted(order) == list(range(24))
    assert list(order) != list(range(24))
    moments, labels = rows_of(whole)
    records = [source.read(int(index)) for index in order]
    pixels = decoder.decode_to_batch([record.data for record in records], [record.key for record in records], 16)
    expected = DctCodec(8, torch.device("cpu")).encode(from_pixels(pixels)).numpy()
    np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-3)
    assert labels.tolist() == [record.label for record in records]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1::2])
def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(images, whole, tmp_path, order):
    for task in order:
        encode_small(images, tmp_path / "out", task=task, tasks=3)
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize("place", ["write_dali_index", "describe_shard", "write_json"])
def test_killed_between_tar_and_marker_a_rerun_gives_the_same_set(images, whole, tmp_path, monkeypatch, place):
    calls = []

    def die_at_third(*values):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*values)

    original = getattr(shard_writer, place)
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, place, die_at_third)
        with pytest.raises(KeyboardInterrupt):
            encode_small(images, tmp_path / "out")
    assert (tmp_path / "out/000002.tar").exists()
    (tmp_path / "out/.000002.tar.host.1.abc.tmp").write_text("left by a killed worker")
    with pytest.raises(
        DataError, match=r"lacks 3 of 5 shards \(000002, 000003, 000004\).*ecar-data encode .* --task 0"
    ):
        finalize(tmp_path / "out")
    stamp = (tmp_path / "out/000000.tar").stat().st_mtime_ns
    encode_small(images, tmp_path / "out")
    assert (tmp_path / "out/000000.tar").stat().st_mtime_ns == stamp  # finished work is not repeated
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_cut_shard_is_made_again(images, whole, tmp_path):
    encode_small(images, tmp_path / "out")
    os.truncate(tmp_path / "out/000001.tar", 1000)
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(tmp_path / "out")
    encode_small(images, tmp_path / "out")
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


CHANGES = {"image_size": 24, "seed": 1, "samples_per_shard": 6, "flip": "store", "decoder": "dali", "precision": "bf16"}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_is_refused_and_nothing_touched(images, whole, name):
    before = content(whole)
    with pytest.raises(
        DataError, match=rf"occupied by another plan: its {'moments_shape|' * (name == 'flip')}{name} is"
    ):
        encode_small(images, whole, **{name: CHANGES[name]})
    assert content(whole) == before


def test_an_occupied_folder_is_refused(images, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty and has no plan\.json"):
        encode_small(images, tmp_path)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_flips_are_moments_of_mirrored_images(images, tmp_path):
    encode_small(images, tmp_path / "out", flip="store")
    finalize(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    shard = LatentShard(tmp_path / "out/000000.tar", manifest.shards[0], manifest)
    # mirroring an image mirrors its blocks and flips the sign of odd horizontal frequencies (every second channel)
    signs = np.array([1, -1] * 6, np.float32)[:, None, None]
    np.testing.assert_allclose(shard.flipped, shard.moments[..., ::-1] * signs, atol=0.02)


def damage_an_image(images, tmp_path, index):
    """A copy of the image shards in which one JPEG is cut short; hashes agree, the picture does not decode."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    source = ImageShards(images)
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    record = source.read(index)
    path = folder / record.shard
    path.write_bytes(path.read_bytes().replace(record.data, record.data[:40] + bytes(len(record.data) - 40)))
    entries = [describe_shard(folder / entry.name, entry.count, entry.first_index) for entry in source.manifest.shards]
    write_manifest(folder, dataclasses.replace(source.manifest, shards=entries))
    return folder, record


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_an_unreadable_image_names_key_and_shard_and_finished_shards_stay(images, tmp_path, decoder):
    encode_small(images, tmp_path / "probe")
    victim = int(read_plan(tmp_path / "probe").source_indices(2)[1])
    damaged, record = damage_an_image(images, tmp_path, victim)
    with pytest.raises(DataError, match=rf"image {record.key} in {record.shard} cannot be decoded"):
        encode_small(damaged, tmp_path / "out", decoder=decoder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    finished = {f"{index:06d}.{kind}" for index in (0, 1) for kind in ("tar", "idx", "json")}
    assert names == finished | {"plan.json"}


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_moments_that_fp16_cannot_hold_are_refused(images, tmp_path, monkeypatch, value):
    class Broken(DctCodec):
        def encode(self, images):
            moments = super().encode(images)
            moments[1, 0, 0, 0] = value
            return moments

    monkeypatch.setattr(encode_module, "open_codec_by_spec", lambda *_: Broken(8, torch.device("cpu")))
    encoded_second = r"moments of image \d{12} in 00000\d.tar are not finite in fp16"
    with pytest.raises(DataError, match=encoded_second):
        encode_small(images, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json"}


def test_settings_that_do_not_fit(images, tmp_path):
    with pytest.raises(ConfigError, match="--image-size 20 is not a multiple of 8"):
        encode_small(images, tmp_path / "out", image_size=20)
    with pytest.raises(ConfigError, match=r"--task 3 is outside 0\.\.2"):
        encode_small(images, tmp_path / "out", task=3, tasks=3)
    assert not (tmp_path / "out").exists()
