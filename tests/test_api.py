"""The Python interface: what a notebook uses, and that it gives the same results as the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ecar_dist
from ecar_dist.cli import main
from ecar_dist.errors import ConfigError, DataError, TrainingError
from tests.fork_server import run_forked
from tests.sample.made_models import NAMES, make_model_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_model_run(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(run):
    return ecar_dist.load(run, device="cpu")


def pixels(images):
    return [np.asarray(image) for image in images]


def test_what_a_model_says_of_itself(model, run):
    assert (model.num_classes, model.class_names, model.image_size) == (10, NAMES, 32)
    assert model.samples_seen == 12 * 16
    assert str(run) in repr(model)
    assert {"Dataset", "Model", "fit", "load"} <= set(dir(ecar_dist))
    with pytest.raises(AttributeError):
        ecar_dist.nothing  # noqa: B018


def test_images_are_those_of_the_command_line(model, run, tmp_path):
    options = ["--guidance-scale", "3", "--steps-per-stage", "1,2,3", "--seed", "5"]
    options += ["--labels", "faces,none", "--count", "3", "--out", str(tmp_path / "a")]
    assert main(["sample", str(run), *options]) == 0
    theirs = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a/images").iterdir())]
    settings = {"guidance_scale": 3, "steps_per_stage": [1, 2, 3], "seed": 5}
    ours = model.sample(["faces", None], count=3, batch_size=2, **settings)
    assert all(isinstance(image, Image.Image) for image in ours)
    assert np.array_equal(pixels(ours), theirs)

    # The stages: the last ones are the samples.
    stages = model.stages([1, None], count=3, **settings)
    assert len(stages) == 3
    assert np.array_equal(pixels(stages[-1]), theirs)
    assert not np.array_equal(pixels(stages[0]), theirs)


def test_a_single_label_and_other_weights(model, run):
    (one,) = model.sample("FACES")
    (same,) = model.sample(1)
    (raw,) = ecar_dist.load(str(run), step=6, ema="raw", device="cpu").sample(1)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, raw)


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["fases"], {}, "did you mean faces?"),
        ([10], {}, "outside 0..9"),
        ([[]], {}, "at least 1"),
        ([0], {"count": 0}, "at least 1"),
        ([0], {"guidance": 3}, "did you mean guidance-"),
        ([0], {"solver": "heunn"}, "--solver"),
        ([0], {"steps_per_stage": [1, 2]}, "has 2 values"),
    ],
)
def test_mistakes(model, arguments, settings, said):
    with pytest.raises(ConfigError) as raised:
        model.sample(*arguments, **settings)
    assert said in str(raised.value)


def test_a_data_set_is_indexed_and_read_by_a_loader(digits):
    data = ecar_dist.Dataset(digits / "latents")
    assert (len(data), data.num_classes, len(data.class_names)) == (1438, 10, 10)
    latent, label = data[0]
    assert (latent.shape, latent.dtype, type(label)) == ((12, 4, 4), torch.float32, int)
    assert torch.equal(data[-1][0], data[1437][0])
    with pytest.raises(IndexError):
        data[1438]

    # Across shards, in any order.
    latents, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=600)))
    assert torch.equal(latents[511], data[511][0])
    assert torch.equal(latents[512], data[512][0])
    assert labels[:3].tolist() == [data[i][1] for i in range(3)]
    assert 0.5 < float(latents.std()) < 2.0  # scaled as the model sees it
    with pytest.raises(ConfigError):
        ecar_dist.Dataset(digits / "latents", mirrored=True)
    with pytest.raises(DataError):
        ecar_dist.Dataset(digits / "nothing")


def test_fit_trains_in_a_process_of_its_own(tree, monkeypatch, capsys):
    def run_quickly(command):  # forked instead of launched
        done = run_forked(*command[command.index("ecar_dist") + 1 :])
        print(done.stdout)
        return done.returncode, done.stderr

    monkeypatch.setattr("ecar_dist.api._run_printed", run_quickly)
    run = ecar_dist.fit(tree, "train.total_samples=16")
    assert run == Path(tree["run"]["dir"]) / "tiny"
    assert "done at step 1" in capsys.readouterr().out
    assert ecar_dist.load(run).class_names == [str(digit) for digit in range(10)]


def test_fit_reports_what_is_wrong(tree, tmp_path, monkeypatch):
    with pytest.raises(ConfigError):
        ecar_dist.fit(tree, "train.total_sample=16")
    tree["data"]["latents"] = str(tmp_path / "nothing")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))

    # In place of the command itself, which takes seconds to start.
    def run(command):
        assert command[-2:] == ["train", str(tmp_path / "mine.yaml")]
        return 1, "nothing/manifest.json does not exist"

    monkeypatch.setattr("ecar_dist.api._run_printed", run)
    with pytest.raises(TrainingError) as raised:
        ecar_dist.fit(tmp_path / "mine.yaml")
    assert "manifest.json" in str(raised.value)


def test_the_output_of_a_process_is_printed(capfd):
    code = "import sys; print('one'); print('ecar-dist: it failed', file=sys.stderr); sys.exit(3)"
    from ecar_dist.api import _run_printed

    assert _run_printed([sys.executable, "-c", code]) == (3, "it failed")
    assert "one\n" in capfd.readouterr().out


def test_names_are_known_to_a_type_checker():
    """mypy reads the package file, which imports the names only for type checkers."""
    text = Path(ecar_dist.__file__).read_text()
    assert "from ecar_dist.api import Dataset, Model, fit, load" in text


def test_importing_is_quick():
    code = "import time; b = time.process_time(); import ecar_dist; print(time.process_time() - b)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5
