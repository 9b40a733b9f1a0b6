"""The code in docs/extending.md works: applied to a copy of the packages, it plans, encodes, trains and samples."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with both packages, and with every block of the page applied to them."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("ecar_dist", "data_tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for language, text in BLOCKS:
        add_file(folder, text) if language == "python" else apply_diff(folder, text)
    return folder


def add_file(folder, text):
    """A new file; the first line is a comment with its path."""
    path = folder / text.splitlines()[0].removeprefix("# ")
    assert not path.exists(), path
    path.write_text(text)


def apply_diff(folder, text):
    """The hunks of a diff without line numbers: the lines that they keep must be in the file exactly once."""
    before, after, *hunks = re.split(r"^(?:---|\+\+\+|@@) ?(?:[ab]/)?", text, flags=re.MULTILINE)[1:]
    assert before == after
    path = folder / before.strip()
    for hunk in (block.removeprefix("\n") for block in hunks):
        kept = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] == " ")
        assert path.read_text().count(kept) == 1, kept
        changed = "".join(line[1:] for line in hunk.splitlines(keepends=True))
        path.write_text(path.read_text().replace(kept, changed))


def run(folder, code, *arguments):
    """Python code in a process that imports the extended packages; returns what it prints."""
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ENCODE = """
from data_tools.cli import main
for command in (
    "shard gradients images",
    "encode images latents --vae block_mean-f4 --image-size 32",
    "finalize latents",
):
    assert main(command.split()) == 0
"""
PLAN = """
import sys
from ecar_dist.cli import main
assert main(["check", "config.yaml"]) == main(["plan", "config.yaml"]) == 0
assert "torch" not in sys.modules
"""
TRAIN = """
from ecar_dist.cli import main
assert main(["train", "config.yaml"]) == 0
"""
COUNT_AND_SAMPLE = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from ecar_dist.cli import main
from ecar_dist.config.read import load_config
from ecar_dist.kinds.table import kind_of

config = load_config("config.yaml")
kind = kind_of(config)
with torch.device("meta"), FlopCounterMode(display=False) as counter:
    model = kind.build_model(config)
    states = [torch.zeros(1, 3, side, side) for side in config.stage_sizes]
    model([], states, [torch.zeros(1)] * len(states), torch.zeros(1, dtype=torch.long))
assert kind.parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
assert kind.training_macs(config) * 2 == 3 * counter.get_total_flops()
assert main("sample runs/tiny --count 4 --out samples".split()) == 0
"""


@pytest.fixture(scope="module")
def latents(extended):
    """Latents of the page's images from the page's codec, and the config of a tiny run that uses all of its parts."""
    run(extended, ENCODE)
    tree = {
        "run": {"name": "tiny"},
        "model": {"kind": "token_mlp", "preset": "T", "patch_size": 1},
        "vae": {"kind": "block_mean", "downsample": 4},
        "data": {"latents": "latents", "num_classes": 2, "latent_channels": 3, "latent_size": 8},
        "batch": {"global_batch_size": 16, "micro_batch_size": 16},
        "optim": {"learning_rate": 1e-2, "schedule": "linear"},
        "deepspeed": {"precision": "fp32"},
        "train": {"total_samples": 6 * 16},
        "sample": {"solver": "rk4", "steps_per_stage": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    (extended / "config.yaml").write_text(yaml.safe_dump(tree))
    return extended / "latents"


def test_it_is_planned_without_torch(extended, latents):
    said = run(extended, PLAN)
    assert "model token_mlp T" in said
    assert "8 velocity calls in each of 3 stages (rk4)" in said


def test_it_trains_and_samples(extended, latents):
    run(extended, TRAIN)
    metrics = [json.loads(line) for line in (extended / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]

    # the schedule: linear to zero at the last sample
    rates = [line["train/lr"] for line in metrics]
    assert rates == pytest.approx([1e-2 * left / 6 for left in (5, 4, 3, 2, 1, 0)])

    run(extended, COUNT_AND_SAMPLE)
    assert len(list((extended / "samples/images").iterdir())) == 4
