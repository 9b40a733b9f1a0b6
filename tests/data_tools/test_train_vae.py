import re

import pytest

from data_tools.cli import main
from data_tools.finalize import finalize
from ecar_dist.data.manifest import load_manifest
from ecar_dist.vae.build import open_codec_by_spec
from tests.data_tools.image_folders import content, encode_small


def train(digits, out, *more):
    return main(["train-vae", str(digits / "images/train"), str(out), "--channels", "8", "--batch-size", "16", *more])


def test_it_learns_and_its_normalisation_fits(digits, tmp_path, capsys):
    assert train(digits, tmp_path / "vae", "--steps", "40", "--learning-rate", "4e-3") == 0
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


def test_an_existing_folder_and_odd_sizes_are_refused(digits, tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    assert train(digits, tmp_path / "vae") == 1
    assert "vae exists; remove it" in capsys.readouterr().err
    assert content(tmp_path / "vae") == {}
    assert train(digits, tmp_path / "new", "--downsample", "3") == 1
    assert "--downsample 3 must be a power of 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
