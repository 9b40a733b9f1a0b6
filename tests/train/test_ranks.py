"""Real ranks under the real DeepSpeed engine: equal losses however the work is split, and after every kind of stop."""

import json

import pytest
from safetensors.torch import load_file

from ecar_dist.runtime.checkpoint.files import committed
from tests.conftest import losses, read_metrics, train_on_ranks, write_yaml
from tests.train.struck_ranks import Struck

FP32_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def reference(make_tree, tmp_path_factory):
    """Metrics of the run on one rank, ZeRO-2, 4 micro-batches of 4."""
    folder = tmp_path_factory.mktemp("reference")
    return train_on_ranks(1, write_yaml(make_tree(folder), folder))


def test_losses_do_not_depend_on_ranks_or_micro_batches_or_zero_stage(write_config, reference):
    config = write_config()
    variants = {
        "two ranks": (2, "batch.micro_batch_size=4"),
        "four ranks": (4, "batch.micro_batch_size=2"),
        "one micro-batch": (1, "batch.micro_batch_size=16"),
        "zero 0": (2, "deepspeed.zero_stage=0"),
        "zero 1": (2, "deepspeed.zero_stage=1"),
        "zero 3": (2, "deepspeed.zero_stage=3"),
    }
    for name, (ranks, override) in variants.items():
        metrics = train_on_ranks(ranks, config, f"run.name={name.replace(' ', '-')}", override)
        assert len(metrics) == len(reference) == 6
        assert losses(metrics) == pytest.approx(losses(reference), abs=FP32_TOLERANCE), name
        norms = [[line["train/grad_norm"] for line in run] for run in (metrics, reference)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
        assert metrics[-1]["samples_seen"] == 96


def test_bf16_stays_near_fp32(write_config, reference):
    bf16 = train_on_ranks(2, write_config(), "run.name=bf16", "deepspeed.precision=bf16")
    assert losses(bf16) == pytest.approx(losses(reference), rel=5e-3)
    assert losses(bf16) != losses(reference)


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(write_config, tree, tmp_path):
    """kill -9 of all ranks at any moment; the same command again; losses, weights, moments and EMA are equal."""
    tree["train"]["total_samples"] = 256
    config = write_config()
    straight = train_on_ranks(2, config, "run.name=straight")
    run = tmp_path / "runs/killed"
    for at_step in (3, 9):
        with Struck(config, "run.name=killed") as job:
            job.reach(at_step)  # all ranks are killed as this block ends
        assert len(read_metrics(config, "run.name=killed")) < 16
    resumed = train_on_ranks(2, config, "run.name=killed")
    assert losses(resumed) == losses(straight)
    assert [line["step"] for line in resumed] == list(range(1, 17))
    attempts = json.loads((run / "lineage.json").read_text())
    assert len(attempts) == 3
    assert attempts[-1]["resumed_from_step"] in (6, 8)  # the save of step 8 may have been under way
    newest = [committed(tmp_path / "runs" / name / "checkpoints")[0] for name in ("straight", "killed")]
    for shard in newest[0].glob("*.safetensors"):
        ours, theirs = load_file(shard), load_file(newest[1] / shard.name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_bf16_resume_into_zero_3_is_bit_for_bit(write_config):
    config, same = write_config(), ("deepspeed.zero_stage=3", "deepspeed.precision=bf16")
    straight = train_on_ranks(2, config, "run.name=straight", "train.total_samples=64", *same)
    train_on_ranks(2, config, "run.name=parted", "train.total_samples=32", *same)
    assert losses(train_on_ranks(2, config, "run.name=parted", "train.total_samples=64", *same)) == losses(straight)
