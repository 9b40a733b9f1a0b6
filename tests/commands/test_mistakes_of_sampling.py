"""User mistakes with a trained model: exit status 1, and one line that contains the fix."""

import json
import shutil

import pytest
import torch

from ecar_dist.cli import main
from ecar_dist.runtime.checkpoint.files import MARKER
from tests.runtime.made_runs import make_checkpoint
from tests.sample.made_models import make_model_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run`, its `export`, and folders that are neither."""
    folder = tmp_path_factory.mktemp("mistakes")
    run = make_model_run(folder / "made")
    (folder / "run").symlink_to(run)
    assert main(["checkpoint", "export", str(run), "--out", str(folder / "export")]) == 0
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("")
    (folder / "file").write_text("")

    # A run without a checkpoint, one with only an EMA snapshot, a damaged export, and an export of a different model.
    shutil.copytree(run, folder / "untrained", ignore=lambda path, names: [n for n in names if n.startswith("step-")])
    shutil.copytree(folder / "untrained", folder / "snapshot")
    state = {"ema": {"weight": torch.zeros(2)}}
    make_checkpoint(folder / "snapshot/ema", 6, state)
    shutil.copytree(folder / "export", folder / "damaged")
    (folder / "damaged/model.safetensors").write_bytes(b"nothing")
    shutil.copytree(folder / "export", folder / "other")
    facts = json.loads((folder / "other/config.json").read_text())
    facts["identity"]["model"]["encoder.weights_sha256"] = "another"
    (folder / "other/config.json").write_text(json.dumps(facts))
    shutil.copytree(run / "checkpoints/step-00000006", folder / "step-00000006")
    shutil.copytree(run, folder / "torn")
    (folder / "torn/checkpoints/step-00000012" / MARKER).write_text("0" * 32)
    return folder


# The words after `ecar-dist`, and what the line must contain. NEW is a folder that does not exist.
SAMPLE = [
    # labels
    ("run --labels flgs", "did you mean flags?"),
    ("run --labels dog,cats", "did you mean dogs?"),
    ("run --labels 3-1", "give 1-3"),
    ("run --labels 8-12", "0..9"),
    ("run --labels 10", "0..9"),
    ("run --labels twin", "4, 5"),
    ("run --labels zebra", "flags, faces"),
    # checkpoints and weights
    ("run --step 7", "[6, 12]"),
    ("run --step six", "whole number"),
    ("run --step -6", "whole number"),
    ("run --ema ema7", "ema1 (half-life 2000"),
    ("run --ema half-life=soon", "half-life=1000000"),
    ("run --ema sigma-rel=0.5", "(0, 0.28)"),
    ("torn --step 12", "older"),
    ("snapshot --step 6 --ema raw", "it has ema ("),
    ("export --step 6", "leave --step"),
    ("export --ema raw", "leave --step and --ema out"),
    # folders
    ("empty", "export"),
    ("nothing", "run directory"),
    ("file", "run directory"),
    ("untrained", "train first"),
    ("damaged", "copy the whole folder again"),
    ("other", "vae.path"),
    ("step-00000006", "--step"),
    ("run/checkpoints/step-00000006 --step 6", "leave --step out"),
    ("run --out full", "--out"),
    ("run --out file", "--out"),
    # settings
    ("run --solver heunn", "'heun'"),
    ("run --steps-per-stage 4,8", "flow.num_stages=3"),
    ("run --steps-per-stage 0", "greater than or equal to 1"),
    ("run --steps-per-stage many", "integer"),
    ("run --time-shift 0", "greater than 0"),
    ("run --guidance-scale -1", "greater than or equal to 0"),
    ("run --guidance-scale nan", "finite"),
    ("run --guidance-scale inf", "finite"),
    ("run --guidance-scale 1,5", "number"),
    ("run --guidance-interval 0.8,0.2", "low < high"),
    ("run --guidance-interval 0.8", "guidance-interval"),
    ("run --guidance-ramp steep", "'linear'"),
    ("run --seed 99999999999999999999", "64 bits"),
    # sweeps
    ("run --sweep guidance-scal=1,2", "did you mean guidance-scale?"),
    ("run --sweep banana=1,2", "choose one of"),
    ("run --sweep guidance-scale", "guidance-scale=1,2,4"),
    ("run --sweep guidance-scale=1,,2", "empty"),
    ("run --sweep guidance-scale=1,two", "number"),
    ("run --sweep step=6,7", "[6, 12]"),
    ("run --sweep ema=ema,ema9", "ema1"),
    (f"run --sweep guidance-scale={','.join(map(str, range(99)))}", "64"),
    ("run --sweep guidance-scale=1,2 --compile", "--compile"),
]
OTHER = [
    ("checkpoint export run --out full", "exists already"),
    ("checkpoint export run --step 7 --out NEW", "[6, 12]"),
    ("checkpoint export run --ema ema7 --out NEW", "ema1"),
    ("checkpoint export snapshot --step 6 --ema raw --out NEW", "it has ema ("),
    ("checkpoint export untrained --out NEW", "train first"),
    ("checkpoint export export --out NEW", "export already"),
    ("checkpoint export run --max-shard-gib 0 --out NEW", "5 is the default"),
    ("checkpoint export run --push-to-hub a/b/c --out NEW", "OWNER/NAME"),
    ("evaluate run --step 7", "[6, 12]"),
    ("evaluate run", "--train-images"),
    ("evaluate run --features inceptoin", "effnet-lite0, inception"),
    ("evaluate run --features inception", "--feature-weights"),
    ("evaluate run --features inception --feature-weights none.pth", "none.pth"),
    ("evaluate run --features effnet-lite0 --reference none.npz", "none.npz"),
    ("evaluate run --reference none.npz", "name one"),
    ("evaluate run --solver heunn", "'heun'"),
    ("init", "--slurm"),
    ("init --slurm file", "another folder"),
]


def one_line(capsys, words, folder, tmp_path, monkeypatch):
    """Run a command that must fail, in `folder`; returns its line."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    new = tmp_path / "new"
    assert main([str(new) if word == "NEW" else word for word in words.split()]) == 1
    _, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("ecar-dist: ")]
    assert len(errors) == 1
    assert "Traceback" not in err
    assert not new.exists()
    return errors[0]


@pytest.mark.parametrize(("words", "fix"), SAMPLE)
def test_sample(words, fix, folder, capsys, tmp_path, monkeypatch):
    out = "" if "--out" in words else " --out NEW"
    assert fix in one_line(capsys, f"sample {words}{out}", folder, tmp_path, monkeypatch)


@pytest.mark.parametrize(("words", "fix"), OTHER)
def test_other_commands(words, fix, folder, capsys, tmp_path, monkeypatch):
    assert fix in one_line(capsys, words, folder, tmp_path, monkeypatch)
