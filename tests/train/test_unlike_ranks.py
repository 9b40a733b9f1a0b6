"""Real ranks that start differently, or begin to differ: the odd one is named, and nothing it did is kept."""

import dataclasses
import os
import shutil

import pytest
import torch

from data_tools.cli import main as ecar_data
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.runtime.checkpoint.files import committed
from ecar_dist.train import loop
from ecar_dist.train import start as beginning
from tests.conftest import free_port, read_metrics
from tests.fork_server import run_ranks

BOUND = 60.0  # seconds for ranks that are notified at once, on a busy machine; the transport itself waits for minutes


@pytest.fixture
def start(write_config, tmp_path, monkeypatch):
    """`train` on ranks that act as nodes n1, n2, ..., each with its own arguments."""
    logs = tmp_path / "job"
    logs.mkdir()
    monkeypatch.setenv("ECAR_JOB_LOGS", str(logs))

    def run(count, *words, each, before=None):
        nodes = {rank: {"SLURMD_NODENAME": f"n{rank + 1}"} for rank in range(count)}
        command = ("train", str(write_config()), *words)
        ended = run_ranks(count, free_port(), *command, timeout=BOUND, each=each, more=nodes, before=before)
        said = [line for rank in ended for line in rank.stderr.splitlines() if line.startswith("ecar-dist:")]
        return [rank.returncode for rank in ended], said, logs

    return run


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("optim.learning_rate", "0.001", "0.5"),  # was silent
        ("run.name", "tiny", "other"),  # was a hang: two run directories
        ("batch.global_batch_size", "16", "32"),  # was a hang: different numbers of micro-batches
    ],
)
def test_two_ranks_with_different_settings_are_both_named_and_nothing_is_begun(start, tmp_path, key, ours, theirs):
    statuses, said, logs = start(2, each={1: [f"{key}={theirs}"]})
    assert statuses == [1, 1]
    (line,) = said
    for word in (f"{key}={ours} on rank 0 on n1", f"{theirs} on rank 1 on n2"):
        assert word in line
    assert not (tmp_path / "runs").exists()
    assert not (logs / "bad-nodes").exists()


def test_of_three_ranks_the_odd_one_is_named_with_all_that_differs(start):
    statuses, said, _ = start(
        3, "batch.global_batch_size=24", each={2: ["run.seed=1", "ema.half_life_samples=[50, 60]"]}
    )
    assert statuses == [1, 1, 1]
    (line,) = said
    assert "rank 2 on n3" in line
    assert "run.seed=1 on rank 2 on n3, 0 elsewhere" in line
    assert "ema.half_life_samples=[50, 60] on rank 2 on n3, [1000000] elsewhere" in line


def test_a_config_that_one_rank_cannot_read_is_said_for_it(start):
    statuses, said, _ = start(2, each={1: ["optim.learning_rat=1"]})
    assert statuses == [1, 1]
    (line,) = said
    assert "rank 1 on n2" in line
    assert "optim.learning_rate" in line


def test_another_data_set_on_one_node_is_named_by_its_id(start, digits, tmp_path):
    """Rank 1 has the held-out pictures, which fit the config as well: this was silent."""
    other = tmp_path / "heldout"
    encode = ["encode", str(digits / "images/heldout"), str(other), "--vae", "dct-f8", "--image-size", "32"]
    assert ecar_data(encode) == 0
    assert ecar_data(["finalize", str(other)]) == 0
    statuses, said, _ = start(2, each={1: [f"data.latents={other}"]})
    assert statuses == [1, 1]
    (line,) = said
    ours, theirs = (load_manifest(folder).dataset_id for folder in (digits / "latents", other))
    assert f"dataset_id of data.latents={ours} on rank 0 on n1, {theirs} on rank 1 on n2" in line
    assert not list(tmp_path.glob("runs/**/lineage.json"))


def test_the_same_data_set_elsewhere_is_the_same(start, digits, tmp_path):
    copied = shutil.copytree(digits / "latents", tmp_path / "copy")
    statuses, said, _ = start(2, "train.total_samples=16", each={1: [f"data.latents={copied}", "data.prefetch=1"]})
    assert (statuses, said) == ([0, 0], [])


def have_another_autoencoder():
    """The last rank acts as if it had loaded different weights from its vae.path."""
    encoder_of = beginning.encoder_of

    def other(data, codec):
        return dataclasses.replace(encoder_of(data, codec), name="/elsewhere", weights_sha256="0" * 64)

    if os.environ["RANK"] != "0":
        beginning.encoder_of = other


def test_another_autoencoder_on_one_node_is_named_before_the_run_begins(start, tmp_path):
    statuses, said, _ = start(2, each={}, before=have_another_autoencoder)
    assert statuses == [1, 1]
    (line,) = said
    assert 'encoder.weights_sha256="' in line
    assert f'"{"0" * 64}" on rank 1 on n2' in line
    assert not (tmp_path / "runs/tiny/lineage.json").exists()


FLIPPED_AT = {0: 3, 2: 4, 3: 4}  # by ZeRO stage; above 0 the next step rewrites all copies; step 4 is to be saved


def flip_a_bit():
    """On the last rank, right after a step: a high bit of the mantissa of one weight that the forward pass reads."""
    settle_step = loop.settle_step

    def flipping(parts, step, result):
        engine, world = parts.state.engine, parts.world
        if step.begun.step + 1 == FLIPPED_AT[engine.zero_stage] and world.rank == world.size - 1:
            engine.replicas()[5].view(torch.int32).view(-1)[7] ^= 1 << 20
        return settle_step(parts, step, result)

    loop.settle_step = flipping


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_bit_that_flips_on_one_of_two_ranks_ends_the_run_before_the_save(start, tmp_path, zero_stage):
    statuses, said, logs = start(2, f"deepspeed.zero_stage={zero_stage}", each={}, before=flip_a_bit)
    assert statuses == [75, 75]
    (line,) = said
    assert "rank 0 on n1; rank 1 on n2" in line
    assert "step 4" in line
    assert [path.name for path in committed(tmp_path / "runs/tiny/checkpoints")] == ["step-00000002"]
    assert not (logs / "bad-nodes").exists()


def test_of_three_ranks_the_one_with_the_flipped_bit_is_kept_out_and_the_run_goes_on(start, write_config, tmp_path):
    words = ("deepspeed.zero_stage=0", "batch.global_batch_size=24", "checkpoint.every_samples=48")
    statuses, said, logs = start(3, *words, each={}, before=flip_a_bit)
    assert statuses == [75, 75, 75]
    assert ["rank 2 on n3 holds different weights" in line for line in said] == [True]
    assert (logs / "bad-nodes").read_text() == "n3\n"
    assert [path.name for path in committed(tmp_path / "runs/tiny/checkpoints")] == ["step-00000002"]
    assert start(3, *words, each={})[0] == [0, 0, 0]
    assert [line["step"] for line in read_metrics(write_config(), *words)] == [1, 2, 3, 4]


def read_twice():
    """Make the last rank read the share of the first."""
    from ecar_dist.data.loader import SampleLoader

    make = SampleLoader.__init__

    def make_for_the_first(self, sources, stream, share, **options):
        make(self, sources, stream, dataclasses.replace(share, rank=0), **options)

    SampleLoader.__init__ = make_for_the_first


def test_a_rank_that_reads_the_samples_of_another_is_named_before_the_first_step(start, tmp_path):
    statuses, said, _ = start(2, each={}, before=read_twice)
    assert statuses == [1, 1]
    assert ["rank 1 on n2" in line for line in said] == [True]
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists() or not read_metrics(tmp_path / "config.yaml")
