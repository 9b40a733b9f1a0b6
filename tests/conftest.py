"""Shared fixtures: real digits as latent shards, and a launcher of real ranks."""

import json
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import yaml

from data_tools.cli import main as ecar_data
from tests.fork_server import run_ranks

# These are read when torch is imported. The scoring classifier trains on two threads whatever the environment says, and
# threads that spin while they wait take several times the CPU seconds if other tests run at the same time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items):
    """Files that train on several ranks run first. The short ones then fill the remaining time of the two workers."""
    items.sort(key=lambda item: "train" not in item.path.parts)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with `images/train`, `images/heldout` (scikit-learn's digits) and `latents` (dct-f8: [12, 4, 4])."""
    folder = tmp_path_factory.mktemp("digits")
    assert ecar_data(["shard", "digits", str(folder / "images"), "--holdout", "0.2"]) == 0
    encode = ["encode", str(folder / "images/train"), str(folder / "latents"), "--vae", "dct-f8", "--image-size", "32"]
    assert ecar_data([*encode, "--samples-per-shard", "512"]) == 0
    assert ecar_data(["finalize", str(folder / "latents")]) == 0
    return folder


@pytest.fixture(scope="session")
def make_tree(digits):
    """The config of a tiny run on the digits, as a dict, whose run directory is `folder`/runs/tiny."""

    def make(folder):
        return {
            "run": {"name": "tiny", "dir": str(folder / "runs")},
            "model": {"preset": "T", "width": 32, "patch_size": 1, "ar_depth": 1, "flow_depth": 1},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {"latents": str(digits / "latents"), "num_classes": 10, "latent_channels": 12, "latent_size": 4},
            "batch": {"global_batch_size": 16, "micro_batch_size": 4},
            "optim": {"learning_rate": 1e-3},
            "deepspeed": {"precision": "fp32"},
            "train": {"total_samples": 96},
            "checkpoint": {"every_samples": 32},
            "log": {"every_steps": 1, "tensorboard": False},
        }

    return make


@pytest.fixture
def tree(make_tree, tmp_path):
    """A tiny run's config for one test to change."""
    return make_tree(tmp_path)


@pytest.fixture
def write_config(tree, tmp_path):
    """Write `tree` to a YAML file and return its path."""
    return lambda: write_yaml(tree, tmp_path)


@pytest.fixture
def quick_classifier(monkeypatch):
    """Scoring trains its classifier for 4 epochs instead of 20: 0.95 of the held-out digits instead of 0.98."""
    from ecar_dist.evaluate.classifier import train_classifier

    monkeypatch.setattr("ecar_dist.evaluate.score.train_classifier", partial(train_classifier, epochs=4))


def write_yaml(tree, folder):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def free_port() -> int:
    """A port that nobody uses. It is bound seconds later, so the workers of pytest-xdist choose from different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port // 2 % workers == worker:  # Linux offers only odd ones
            return port


def start_ranks(ranks, config, *overrides, **environment):
    """Start `ecar-dist train` on real ranks under torchrun; returns the Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port()), "-m", "ecar_dist", "train", str(config), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def train_on_ranks(ranks, config, *overrides):
    """Run to the end, on ranks that are forked instead of launched; returns the lines of metrics.jsonl."""
    ended = run_ranks(ranks, free_port(), "train", str(config), *overrides)
    assert not any(rank.returncode for rank in ended), "".join(rank.stdout + rank.stderr for rank in ended)
    return read_metrics(config, *overrides)


def read_metrics(config, *overrides):
    from ecar_dist.config.read import load_config

    path = load_config(config, overrides).run_directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(metrics):
    return [line["train/loss"] for line in metrics]
