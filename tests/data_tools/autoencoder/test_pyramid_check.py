"""`ecar-data pyramid-check`: exact where latents are pixels; a closed form where latents do not pool."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_tools.autoencoder import pyramid_check as checking
from data_tools.autoencoder.pyramid_check import Distance, StageCheck, check_batch
from data_tools.cli import main
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity
from tests.data_tools.image_folders import write_image_folder


class PackedCodec:
    """A lossless codec whose latents do not pool: each has the four pixels of a block, one per channel and colour."""

    identity = EncoderIdentity("packed", "packed-f2", "", "", 12, 2, 4.0, 0.5, deterministic=True)

    def encode(self, images):
        return F.pixel_unshuffle(images, 2)

    def decode(self, latents):
        return F.pixel_shuffle(latents / 4.0 + 0.5, 2).clamp(-1.0, 1.0)


def checks_of(codec, images, stages):
    side, downsample = images.shape[-1], codec.identity.downsample
    sides = [side // 2 ** (stages - 1 - stage) for stage in range(stages)]
    checks = [StageCheck(one // downsample, one) for one in sides]
    check_batch(codec, images, checks)
    return checks


def random_images(side):
    return torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)) / 127.5 - 1.0


def test_pixels_pool_as_pixels():
    for check in checks_of(open_codec_by_spec("identity-f1"), random_images(16), 3):
        assert check.pooled.psnr == check.enlarged.psnr == check.encoded.psnr == math.inf
        assert check.pooled.mean_absolute == check.lost == 0.0
        assert check.pooled.numbers == 3 * 3 * check.image_size**2


def test_packed_pixels_do_not_pool_by_the_closed_form():
    images = random_images(16)
    coarse, fine = checks_of(PackedCodec(), images, 2)
    assert fine.pooled.psnr > 100
    assert coarse.encoded.psnr > 100

    # D(x): means of neighbours. Dec(D(z)): means of every second pixel of 4 x 4, since a channel is one position in
    # a block.
    x = (images.double().numpy() + 1) * 127.5
    means = x.reshape(3, 3, 8, 2, 8, 2).mean((3, 5))
    decoded = x.reshape(3, 3, 4, 2, 2, 4, 2, 2).mean((3, 6)).reshape(3, 3, 8, 8)
    assert coarse.pooled.psnr == pytest.approx(10 * math.log10(255**2 / np.square(decoded - means).mean()), abs=1e-3)
    assert coarse.pooled.mean_absolute == pytest.approx(np.abs(decoded - means).mean(), rel=1e-4)
    assert coarse.lost == pytest.approx(coarse.encoded.psnr - coarse.pooled.psnr)
    assert fine.lost == 0.0

    # Dec(U(D(z))): each decoded block is repeated as a block, while U(D(x)) repeats each pixel.
    blocks = decoded.reshape(3, 3, 4, 2, 4, 2)
    repeated = blocks.repeat(2, axis=2).repeat(2, axis=4).reshape(3, 3, 16, 16)
    enlarged = means.repeat(2, axis=2).repeat(2, axis=3)
    error = np.square(repeated - enlarged).mean()
    assert coarse.enlarged.psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


def test_batches_add_up():
    images = random_images(8)
    whole, parts = Distance(), Distance()
    whole.add(images, torch.zeros_like(images))
    for image in images:
        parts.add(image[None], torch.zeros(1, 3, 8, 8))
    assert parts.psnr == pytest.approx(whole.psnr)
    assert parts.numbers == whole.numbers


def test_a_folder_of_images_as_table_and_as_json(tmp_path, monkeypatch, capsys):
    folder = write_image_folder(tmp_path / "in") / "cat"
    (folder / "3.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("left out")
    monkeypatch.setattr(checking, "_BATCH", 3)
    options = ["--flat", "--vae", "dct-f8", "--image-size", "16", "--stages", "2", "--device", "cpu"]
    assert main(["pyramid-check", str(folder), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["autoencoder"], found["images"]) == ("dct-f8", 7)
    assert [(stage["latent_size"], stage["image_size"]) for stage in found["stages"]] == [(1, 8), (2, 16)]
    coarse, fine = found["stages"]
    assert fine["pooled"] == fine["enlarged"] == fine["encoded"]
    assert 5 < coarse["pooled"]["psnr"] < coarse["encoded"]["psnr"] < 30
    assert main(["pyramid-check", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "1 image left out" in out
    assert f"{coarse['pooled']['psnr']:.2f}, {coarse['pooled']['mean_absolute']:.2f}" in out
    assert main(["pyramid-check", str(folder), *options[:4], "24", *options[5:]]) == 1
    assert "a multiple of 16" in capsys.readouterr().err


def test_nothing_to_decode(tmp_path, capsys):
    (tmp_path / "in/cat").mkdir(parents=True)
    Image.new("F", (8, 8)).save(tmp_path / "in/cat/0.tiff")
    assert main(["pyramid-check", str(tmp_path / "in"), "--vae", "identity-f1", "--image-size", "8"]) == 1
    assert "none of the images" in capsys.readouterr().err
