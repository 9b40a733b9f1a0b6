"""The baselines through the commands: trained, resumed, drawn, exported and scored."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.codebook.fit import fit_codebook
from ecar_dist.cli import main
from ecar_dist.data.codebook import codebook_of
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.sample.load import open_trained
from tests.conftest import losses, read_metrics, train_on_ranks, write_yaml
from tests.train.test_start import train_alone

NUM_STAGES = {"dit": 1, "pyramid": 2, "mar": 1, "par": 1, "hybrid": 1}
OVER_CODES = ("par", "hybrid")


@pytest.fixture(scope="module", params=NUM_STAGES)
def trained(request, digits, make_tree, tmp_path_factory):
    """(kind, run directory, metrics): two steps, then two more; for `mar` and `par` first on two ranks, ZeRO-3."""
    kind, folder = request.param, tmp_path_factory.mktemp("kinds")
    tree = make_tree(folder)
    tree["model"] |= {"kind": kind, "width": None, "flow_depth": 2}  # the width of T learns faster
    tree["flow"] = {"num_stages": NUM_STAGES[kind]}
    tree["data"] |= {"train_images": str(digits / "images/train"), "heldout_images": str(digits / "images/heldout")}
    tree["sample"] = {"steps_per_stage": 2, "every_samples": 32, "ar_steps": 4, "code_steps": 2}
    tree["log"]["tensorboard"] = True
    if kind in OVER_CODES:
        latents = shutil.copytree(digits / "latents", folder / "latents")
        fit_codebook(latents, size=64, patch_size=1, iterations=2)
        tree["model"]["codebook_size"] = 64
        tree["data"]["latents"] = str(latents)
        tree["par"] = {"group": 4}
        tree["deepspeed"]["precision"] = "bf16"
    config = write_yaml(tree, folder)
    if kind in ("mar", "par"):
        train_on_ranks(2, config, "train.total_samples=32", "deepspeed.zero_stage=3")
    else:
        train_alone(config, "train.total_samples=32")
    said, _ = train_alone(config, "train.total_samples=64")
    assert any("resuming at step 2 (32 samples)" in line for line in said)
    return kind, folder / "runs/tiny", read_metrics(config)


def test_a_run_goes_on_and_its_loss_falls(trained):
    kind, run, metrics = trained
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert losses(metrics)[3] < losses(metrics)[0]
    identity = read_manifest(run / "checkpoints/step-00000004").identity["model"]
    assert (identity["model.kind"], identity["model.flow_depth"]) == (kind, 2)
    by_time = [tag for tag in metrics[-1] if tag.startswith("train/loss_stage0_t")]
    assert bool(by_time) == (kind not in ("mar", *OVER_CODES))


def test_the_codebook_is_that_of_the_data_to_the_bit(trained):
    """After training in bf16, for `par` on two ranks, and after averaging its values."""
    kind, run, _ = trained
    if kind in OVER_CODES:
        folder = run.parents[1] / "latents"
        codes = codebook_of([str(folder)], [load_manifest(folder)], 64, 1).codes
        for name in ("ema", "raw"):
            assert torch.equal(open_trained(run, torch.device("cpu"), ema=name).model.codebook.codes, codes)


def test_previews_show_every_stage(trained):
    kind, run, _ = trained
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert [image.step for image in events.Images(tag)] == [2, 4]
    assert (events.Images(tag)[0].height > 100) == (NUM_STAGES[kind] > 1)  # a row of 64 pixels per stage


def test_it_is_drawn_exported_and_scored(trained, quick_classifier, tmp_path, capsys):
    kind, run, _ = trained
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert "samples equal the run's" in capsys.readouterr().out
    assert max(json.loads((tmp_path / "export/parity.json").read_text())["max_abs_difference"]["samples"]) == 0.0
    assert main(["sample", str(tmp_path / "export"), "--count", "4", "--out", str(tmp_path / "samples")]) == 0
    assert len(list((tmp_path / "samples/images").iterdir())) == 4
    if kind == "mar":  # the others are drawn by ECAR's sampler
        assert main(["evaluate", str(run), "--count", "32", "--out", str(tmp_path / "scores.json")]) == 0
        assert json.loads((tmp_path / "scores.json").read_text())["FD-digits"] > 0
