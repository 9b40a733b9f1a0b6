"""Images in, pictures out: every real part once, with a learned autoencoder, on two ranks."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main
from tests.conftest import train_on_ranks, write_yaml


@pytest.fixture(scope="module")
def path(digits, make_tree, tmp_path_factory):
    """Autoencoder, latents and a two-rank run on them; returns the folder and its config file."""
    folder = tmp_path_factory.mktemp("path")
    images, vae, latents = (str(folder / name) for name in ("images", "vae", "latents"))
    shutil.copytree(digits / "images", images)
    train_vae = ["train-vae", f"{images}/train", "--latent-channels", "2", "--steps", "8"]
    assert ecar_data([*train_vae, vae]) == 0
    assert ecar_data([*train_vae, str(folder / "other_vae"), "--seed", "1"]) == 0
    assert ecar_data(["encode", f"{images}/train", latents, "--vae", vae, "--image-size", "32"]) == 0
    assert ecar_data(["finalize", latents]) == 0
    tree = make_tree(folder)
    tree["vae"] = {"kind": "kl", "path": vae, "downsample": 4}
    tree["data"].update(latents=latents, latent_channels=2, latent_size=8)
    tree["data"].update(train_images=f"{images}/train", heldout_images=f"{images}/heldout")
    tree["sample"] = {"steps_per_stage": 2, "every_samples": 48}
    tree["log"]["tensorboard"] = True
    config = write_yaml(tree, folder)
    train_on_ranks(2, config)
    return folder, config


def test_two_ranks_draw_and_are_scored(path, quick_classifier):
    folder, _ = path
    run = str(folder / "runs/tiny")
    assert main(["sample", run, "--count", "20", "--out", str(folder / "samples")]) == 0
    assert np.asarray(Image.open(folder / "samples/grid.png")).std() > 0
    assert len(list((folder / "samples/images").glob("*.png"))) == 20
    assert main(["evaluate", run, "--count", "64"]) == 0
    scores = json.loads((folder / "runs/tiny/scores.json").read_text())
    assert scores["FD-digits"] > 0
    assert scores["samples"] == 64
    events = EventAccumulator(str(folder / "runs/tiny/tb"))
    events.Reload()
    (point,) = events.Scalars("eval/FD-digits")
    assert (point.step, point.value) == (6, pytest.approx(scores["FD-digits"], rel=1e-5))
    assert len(events.Scalars("train/loss")) == 6


def test_another_autoencoder_is_refused_by_training_and_by_sampling(path, tmp_path, capsys):
    folder, config = path
    other = f"vae.path={folder / 'other_vae'}"
    with pytest.raises(AssertionError, match="use the autoencoder that encoded the latents"):
        train_on_ranks(1, config, other, "run.name=other")
    assert not (folder / "runs/other").exists()
    run = shutil.copytree(folder / "runs/tiny", tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(folder / "vae"), str(folder / "other_vae")))
    capsys.readouterr()
    assert main(["sample", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "latents of an autoencoder other than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
