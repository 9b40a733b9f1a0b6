"""`ecar-dist sample` as a user sees it: weights, labels and settings."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ecar_dist.cli import main
from tests.sample.made_models import make_model_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_model_run(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def draw(run, tmp_path_factory):
    """Draw one image of each label with options; returns their names and pixels."""

    def draw(*options, source=run, labels="1", count=None):
        out = tmp_path_factory.mktemp("drawn") / "out"
        words = [str(word) for word in (source, "--labels", labels, "--count", count or len(labels.split(",")))]
        assert main(["sample", *words, "--out", str(out), *map(str, options)]) == 0
        return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())}

    return draw


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_newest_checkpoint_is_drawn_unless_a_step_or_a_folder_is_given(run, draw):
    newest, first = draw(), draw("--step", 6)
    assert list(newest) == ["000000-class1-faces.png"]
    assert same(newest, draw("--step", "12"))
    assert not same(newest, first)
    assert same(first, draw(source=run / "checkpoints/step-00000006"))


def test_the_weights_have_names(draw):
    default, second, raw = draw(), draw("--ema", "ema1"), draw("--ema", "raw")
    assert same(default, draw("--ema", "ema"))
    assert same(default, draw("--ema", "half-life=1000"))
    assert same(second, draw("--ema", "half-life=2000"))
    assert same(raw, draw("--ema", "none"))
    assert not same(default, second)
    assert not same(second, raw)


def test_every_setting_of_the_sampler_is_an_option(draw):
    default = draw()
    for option in (
        ("--solver", "heun"),
        ("--steps-per-stage", "3"),
        ("--steps-per-stage", "2,1,4"),
        ("--time-shift", "2.5"),
        ("--guidance-scale", "5"),
        ("--guidance-ramp", "constant"),
        ("--guidance-interval", "0.4,0.8"),
        ("--seed", "1"),
    ):
        assert not same(default, draw(*option)), option
    assert same(default, draw("--guidance-interval", "0,1", "--steps-per-stage", "2,2,2"))


def test_an_export_of_a_step_and_an_ema_has_names_and_draws_the_same(run, draw, tmp_path):
    words = ["--step", "6", "--ema", "raw", "--out", str(tmp_path / "export")]
    assert main(["checkpoint", "export", str(run), *words]) == 0
    ours = draw(source=tmp_path / "export", labels="Flags,none", count=2)
    assert list(ours) == ["000000-class0-flags.png", "000001-none.png"]
    assert same(ours, draw("--step", 6, "--ema", "raw", labels="flags,none", count=2))
    assert json.loads((tmp_path / "export/config.json").read_text())["average"] == {"kind": "raw"}
    assert "without an EMA" in (tmp_path / "export/README.md").read_text()


def test_runs_and_exports_without_names_still_work(draw, tmp_path):
    old = make_model_run(tmp_path, names=None)
    assert list(draw(source=old)) == ["000000-class1.png"]
    assert main(["checkpoint", "export", str(old), "--out", str(tmp_path / "export")]) == 0
    facts = json.loads((tmp_path / "export/config.json").read_text())
    del facts["class_names"], facts["average"]
    (tmp_path / "export/config.json").write_text(json.dumps(facts))
    assert list(draw(source=tmp_path / "export")) == ["000000-class1.png"]


@pytest.mark.parametrize("names", [["only", "two"], "text", [1] * 10, ["line\nbreak"] * 10])
def test_names_that_make_no_sense_are_left_out(names, draw, tmp_path):
    assert list(draw(source=make_model_run(tmp_path, names=names))) == ["000000-class1.png"]


def test_an_old_run_takes_the_names_from_its_data(digits, draw, tmp_path):
    latents = {"latents": str(digits / "latents"), "num_classes": 10, "latent_channels": 12, "latent_size": 4}
    manifest = json.loads((digits / "latents/manifest.json").read_text())
    run = make_model_run(tmp_path, names=None, data=latents)
    assert manifest["class_names"][1] == "1"
    assert list(draw(source=run, labels=manifest["class_names"][1])) == ["000000-class1.png"]


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("guidance-scale=1,2,4", ["1", "2", "4"]),
        ("steps-per-stage=1,1:2:3", ["1", "1:2:3"]),
        ("step=6,12", ["6", "12"]),
        ("ema=ema,raw", ["ema", "raw"]),
    ],
)
def test_a_sweep_is_one_sheet_with_a_row_for_each_value(run, draw, tmp_path, sweep, values):
    option = sweep.partition("=")[0]
    out = tmp_path / "out"
    assert main(["sample", str(run), "--sweep", sweep, "--labels", "1,0", "--out", str(out)]) == 0
    margin, side = 2, 64
    sheet = Image.open(out / "sweep.png")
    assert sheet.height == 14 + margin + len(values) * (side + margin)
    assert 0 < sheet.width - (margin + 2 * (side + margin)) < 200  # the names of the rows

    # Each row equals what is drawn with that option value alone.
    names = ["000000-class1-faces.png", "000001-class0-flags.png"]
    for value in values:
        folder = out / "images" / f"{option}-{value.replace(':', '_')}"
        alone = draw(f"--{option}", value, labels="1,0")
        assert same({name: np.asarray(Image.open(folder / name)) for name in names}, alone)


def test_a_checkpoint_folder_far_from_its_run_names_the_way(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints/step-00000006", tmp_path / "step-00000006")
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "step-00000006"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "--step" in said
    assert not (tmp_path / "out").exists()
