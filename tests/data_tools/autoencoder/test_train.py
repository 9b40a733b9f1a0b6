import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from data_tools.autoencoder import state, train
from data_tools.autoencoder.pictures import Pictures
from data_tools.cli import main
from data_tools.failures import FailureTally
from data_tools.finalize import finalize
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.vae.build import open_codec_by_spec
from tests.data_tools.bad_images import write_bad_image_shards
from tests.data_tools.image_folders import content, encode_small
from tests.data_tools.workers import die_in_training, start


def train_on_digits(digits, out, *more):
    return main(["train-vae", str(digits / "images/train"), str(out), "--channels", "8", "--batch-size", "16", *more])


def test_it_learns_and_its_normalisation_fits(digits, tmp_path, capsys):
    assert train_on_digits(digits, tmp_path / "vae", "--steps", "40", "--learning-rate", "4e-3") == 0
    printed = capsys.readouterr().out
    psnr = float(re.search(r"held-back images ([\d.]+) dB", printed).group(1))
    assert psnr > 15  # an untrained net reaches about 6, the mean image about 10
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    identity = open_codec_by_spec(str(tmp_path / "vae")).identity
    assert (identity.latent_channels, identity.downsample) == (4, 4)
    encode_small(
        digits / "images/heldout", tmp_path / "out", vae=str(tmp_path / "vae"), image_size=32, samples_per_shard=200
    )
    finalize(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.moments_shape == (8, 8, 8)
    mean, std = (manifest.statistics[f"normalised_{name}"] for name in ("mean", "std"))
    second_moment = sum(m * m + s * s for m, s in zip(mean, std, strict=True)) / 4
    assert second_moment == pytest.approx(1.0, abs=0.1)


SMALL = ["--channels", "8", "--batch-size", "4", "--steps", "7", "--image-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory):
    return write_bad_image_shards(tmp_path_factory.mktemp("bad"))


def errors_of(out):
    return [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]


def command(images, out, *more):
    return ["train-vae", str(images), str(out), *SMALL, *more]


def test_bad_images_are_left_out_and_listed_under_their_files_names(bad_images, tmp_path, capsys):
    out = tmp_path / "vae"
    assert main(command(bad_images, out)) == 1
    assert len(errors_of(out)) >= 1
    said = capsys.readouterr().err
    assert "--max-bad 0.001 allows 0" in said
    assert re.search(r"image 0000000000\d\d \((bird|cat)/\d\.(png|jpeg)\) in 00000\d\.tar", said)
    assert main(command(bad_images, out, "--max-bad", "0.125")) == 0
    assert "3 bad images left out" in capsys.readouterr().out
    listed = errors_of(out)
    assert [(line["row"], line["name"]) for line in listed] == [
        (2, "bird/2.jpeg"),
        (11, "cat/3.png"),
        (13, "cat/5.png"),
    ]


def test_killed_and_run_again_it_ends_with_the_same_weights(bad_images, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(bad_images, whole, "--max-bad", "0.2")) == 0
    for step in (0, 3, 2):
        process = start(die_in_training, step, command(bad_images, killed, "--max-bad", "0.2"))
        process.join()
        assert process.exitcode == -9
    with safe_open(killed / state.STATE_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 5
    capsys.readouterr()
    assert main(command(bad_images, killed, "--max-bad", "0.2", "--steps", "8")) == 1
    assert "with steps 7, this command has 8; repeat the first command" in capsys.readouterr().err
    assert main(command(bad_images, killed, "--max-bad", "0.2")) == 0
    assert content(killed) == content(whole)
    assert sorted(content(killed)) == ["config.json", "diffusion_pytorch_model.safetensors", "errors.jsonl"]


def test_one_image_is_too_few(tmp_path, capsys):
    (tmp_path / "in/a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "in/a/0.png")
    assert main(["shard", str(tmp_path / "in"), str(tmp_path / "images")]) == 0
    assert main(command(tmp_path / "images", tmp_path / "vae")) == 1
    assert "has 1 image, training needs at least 2" in capsys.readouterr().err


def test_killed_while_the_autoencoder_is_put_in_place(digits, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    images, out = digits / "images/heldout", tmp_path / "vae"
    true_replace = os.replace
    moved = lambda source, _: ".finished" in str(source)  # noqa: E731
    monkeypatch.setattr(os, "replace", lambda *names: stop() if moved(*names) else true_replace(*names))
    assert main(command(images, out)) == 130
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    monkeypatch.setattr(train, "_step", lambda *_, **__: pytest.fail("trained again"))
    assert main(command(images, out)) == 0
    assert sorted(content(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"not a state", b"PK\x03\x04"])
def test_a_damaged_state_is_one_line(digits, tmp_path, capsys, damage):
    out = tmp_path / "vae"
    out.mkdir()
    (out / state.STATE_NAME).write_bytes(damage)
    assert main(command(digits / "images/heldout", out)) == 1
    said = capsys.readouterr().err.splitlines()
    assert "is damaged" in said[-1]
    assert f"remove {out} and start again" in said[-1]


def test_an_occupied_folder_and_odd_sizes_are_refused(digits, tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/mine.txt").write_text("mine")
    assert train_on_digits(digits, tmp_path / "vae") == 1
    assert "vae exists and contains mine.txt; remove it" in capsys.readouterr().err
    assert content(tmp_path / "vae") == {"mine.txt": b"mine"}
    assert train_on_digits(digits, tmp_path / "new", "--downsample", "3") == 1
    assert "--downsample 3 must be a power of 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_width_that_the_norms_cannot_take_is_refused(capsys, tmp_path):
    assert main(["train-vae", str(tmp_path), str(tmp_path / "out"), "--channels", "4"]) == 1
    said = capsys.readouterr().err
    assert "--channels 4" in said
    assert "multiple of 8" in said


def test_a_batch_across_the_end_of_an_epoch_may_hold_an_image_twice(digits, tmp_path):
    images = ImageShards(digits / "images/train")
    tally = FailureTally(tmp_path, len(images), 0)
    pictures = Pictures(images, open_decoder("pil"), 16, torch.device("cpu"), 0, tally)
    batch = pictures.load(np.array([3, 3, 5]))
    assert len(batch) == 3
    assert batch[0].equal(batch[1])
    assert not batch[0].equal(batch[2])
