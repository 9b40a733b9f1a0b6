import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.finalize import finalize
from data_tools.inspection import preview, stats, verify
from ecar_dist.data.manifest import load_manifest, write_manifest
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.errors import DataError
from tests.data_tools.image_folders import encode_small, write_image_shards


@pytest.fixture
def sets(tmp_path):
    images = write_image_shards(tmp_path)
    encode_small(images, tmp_path / "latents")
    finalize(tmp_path / "latents")
    return images, tmp_path / "latents"


def test_verify_passes_whole_sets(sets, capsys):
    for folder in sets:
        verify(folder)
    assert capsys.readouterr().out.count("24 samples verified") == 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_finds_damage(sets, which, damage):
    path = sets[which] / "000001.tar"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-512])
    if damage == "remove":
        path.unlink()
    with pytest.raises(DataError, match=r"000001\.tar"):
        verify(sets[which])


@pytest.mark.parametrize(("at", "message"), [(700, r"CRC-32 of row 0"), (512 + 128 + 1, "CRC-32 of row 0")])
def test_verify_finds_what_hashes_hide(sets, at, message):
    """A payload changed before the hashes were taken: only the sample's own checksum knows."""
    _, latents = sets
    path = latents / "000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    manifest = load_manifest(latents)
    entries = [describe_shard(path, 5, 0), *manifest.shards[1:]]
    write_manifest(latents, dataclasses.replace(manifest, shards=entries))
    with pytest.raises(DataError, match=message):
        verify(latents)


def test_verify_of_nothing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        verify(tmp_path)


def test_stats_prints_the_manifest(sets, capsys):
    stats(sets[1])
    printed = capsys.readouterr().out
    assert "24 in 5 shards" in printed
    assert "[12, 2, 2]" in printed
    assert load_manifest(sets[1]).dataset_id in printed


def test_preview_shows_the_digits(digits, tmp_path):
    preview(digits / "latents", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (256, 256, 3)
    corners = sheet.reshape(8, 32, 8, 32, 3)[:, :3, :, :3]
    assert sheet.max() > 200
    assert corners.mean() < 40  # digits are light on dark, in the middle of their squares


def test_preview_refuses_another_autoencoder(sets, tmp_path):
    with pytest.raises(DataError, match="autoencoder dct-f32 has config_sha256"):
        preview(sets[1], tmp_path / "sheet.png", vae="dct-f32")
    assert not (tmp_path / "sheet.png").exists()
    assert json.loads((sets[1] / "manifest.json").read_text())["encoder"]["name"] == "dct-f8"
