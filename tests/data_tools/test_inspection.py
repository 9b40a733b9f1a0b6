import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.finalize import finalize
from data_tools.inspection import preview, stats, verify
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.data.shards.proof import describe_shard
from ecar_dist.errors import ConfigError, DataError
from tests.data_tools.bad_images import write_bad_image_shards
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


@pytest.mark.parametrize(
    ("at", "message"),
    [(700, r"CRC-32 .*000000000000"), (512 + 128 + 1, "CRC-32 .*000000000000")],
)
def test_verify_finds_what_hashes_hide(sets, at, message):
    """A payload changed before the hashes were taken: only the sample's own checksum reveals it."""
    _, latents = sets
    path = latents / "000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    manifest = load_manifest(latents)
    hashes = {"xxh3_128": describe_shard(path, 5, 0).xxh3_128, "sha256": describe_shard(path, 5, 0).sha256}
    entries = [dataclasses.replace(manifest.shards[0], **hashes), *manifest.shards[1:]]
    write_manifest(latents, dataclasses.replace(manifest, shards=entries))
    with pytest.raises(DataError, match=message):
        verify(latents)


def test_verify_says_what_it_found(sets):
    path, entry = sets[1] / "000001.tar", load_manifest(sets[1]).shards[1]
    data = path.read_bytes()
    path.write_bytes(data[:-700] + b"x" + data[-699:])
    found = describe_shard(path, entry.count, entry.first_index).sha256
    with pytest.raises(DataError, match=rf"000001\.tar .*{found}, .*{entry.sha256};"):
        verify(sets[1])
    path.write_bytes(data + bytes(512))
    with pytest.raises(DataError, match=rf"{len(data) + 512} bytes, .*{len(data)};"):
        verify(sets[1])


@pytest.mark.parametrize("run", [verify, stats, lambda folder: preview(folder, Path("x.png"))])
def test_a_url_is_not_a_folder(run):
    with pytest.raises(DataError, match=r"s3://bucket/set is a URL"):
        run(Path("s3://bucket/set"))


def test_verify_of_nothing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        verify(tmp_path)


def test_stats_prints_the_manifest(sets, capsys):
    stats(sets[1])
    printed = capsys.readouterr().out
    assert "24 in 5 shards" in printed
    assert "3: 0 bird, 1 cat, 2 dog\n" in printed
    assert "[12, 2, 2]" in printed
    assert load_manifest(sets[1]).dataset_id in printed
    assert "posterior_sharpness none, the encoder is deterministic" in printed
    assert "0.00e+00 of means at the limit of fp16" in printed
    assert "failures            0\n" in printed


def test_stats_ends_a_long_list_of_classes(sets, capsys):
    manifest = load_manifest(sets[1])
    names = [f"class-{label}" for label in range(1000)]
    write_manifest(sets[1], dataclasses.replace(manifest, num_classes=1000, class_names=names))
    stats(sets[1])
    printed = capsys.readouterr().out
    assert "1000: 0 class-0," in printed
    assert "99 class-99, ..." in printed
    assert "class-100" not in printed


@pytest.mark.parametrize(("sharpness", "said"), [(0.0009, "0.00090, below 0.001: "), (0.0011, "0.00110\n")])
def test_stats_warns_if_the_posterior_is_a_point(sets, capsys, sharpness, said):
    manifest = load_manifest(sets[1])
    numbers = {**manifest.statistics, "posterior_sharpness": sharpness}
    encoder = {**manifest.encoder, "deterministic": False, "latent_channels": 6}
    write_manifest(sets[1], dataclasses.replace(manifest, statistics=numbers, encoder=encoder))
    stats(sets[1])
    assert f"posterior_sharpness {said}" in capsys.readouterr().out


def test_verify_reads_dalis_index(sets):
    path = sets[1] / "000001.idx"
    path.write_text(path.read_text().replace("latent.npy 512", "latent.npy 513"))
    with pytest.raises(DataError, match=r"000001\.idx is not the index of its tar"):
        verify(sets[1])
    path.unlink()
    verify(sets[1])


def test_verify_counts_bad_images(tmp_path):
    images = write_bad_image_shards(tmp_path)
    with pytest.raises(
        DataError, match=r"3 of 24 images cannot be used, the first: image 000000000002 \(bird/2\.jpeg\) in 000000\.tar"
    ):
        verify(images)


def test_preview_of_fewer_samples_than_places(sets, tmp_path):
    preview(sets[1], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(8, 16, 8, 16, 3).swapaxes(1, 2)
    filled = sheet.reshape(64, -1).any(axis=1)
    assert filled.tolist() == [place < 24 for place in range(64)]


def test_preview_shows_the_digits(digits, tmp_path):
    preview(digits / "latents", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (256, 256, 3)
    corners = sheet.reshape(8, 32, 8, 32, 3)[:, :3, :, :3]
    assert sheet.max() > 200
    assert corners.mean() < 40  # digits are light on dark, in the middle of their squares


def test_preview_when_the_autoencoder_has_moved(sets, tmp_path):
    manifest = load_manifest(sets[1])
    gone = {**manifest.encoder, "name": str(tmp_path / "gone")}
    write_manifest(sets[1], dataclasses.replace(manifest, encoder=gone))
    with pytest.raises(ConfigError, match=r"gone does not exist.*; if the autoencoder .* has moved, give --vae"):
        preview(sets[1], tmp_path / "sheet.png")
    preview(sets[1], tmp_path / "sheet.png", vae="dct-f8")


def test_preview_refuses_another_autoencoder(sets, tmp_path):
    with pytest.raises(DataError, match="autoencoder dct-f32 has config_sha256"):
        preview(sets[1], tmp_path / "sheet.png", vae="dct-f32")
    assert not (tmp_path / "sheet.png").exists()
    assert json.loads((sets[1] / "manifest.json").read_text())["encoder"]["name"] == "dct-f8"


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_verify_does_not_read_pipes_or_devices(sets, kind):
    for folder in sets:
        path = sorted(folder.glob("*.tar"))[0]
        path.unlink()
        if kind == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(DataError, match=r" 0 bytes"):
            verify(folder)


def test_preview_proposes_an_extension(sets, tmp_path, capsys):
    assert main(["preview", str(tmp_path), "--out", str(tmp_path / "1.5")]) == 1
    assert "1.5.png" in capsys.readouterr().err
