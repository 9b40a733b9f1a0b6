"""The validation loss: fixed, the same on any number of ranks, and without any effect on training."""

import pytest
import torch

from data_tools.cli import main as ecar_data
from ecar_dist.errors import DataError
from ecar_dist.train.validation.heldout import check_heldout
from tests.conftest import losses, train_on_ranks, write_yaml
from tests.train.test_objective import IDENTITY, KINDS, batch, make_config, make_model, objective
from tests.train.test_start import train_alone

TAGS = {"eval/loss", "eval/loss_ema"} | {f"eval/loss{ema}_stage{k}" for ema in ("", "_ema") for k in range(3)}


@pytest.fixture(scope="module")
def heldout(digits, tmp_path_factory):
    """Latents of the held-out digits, in shards of 100."""
    out = tmp_path_factory.mktemp("heldout") / "latents"
    encode = ["encode", str(digits / "images/heldout"), str(out), "--vae", "dct-f8", "--image-size", "32"]
    assert ecar_data([*encode, "--samples-per-shard", "100"]) == 0
    assert ecar_data(["finalize", str(out)]) == 0
    return out


@pytest.fixture
def validated(tree, heldout, tmp_path):
    """The config of a run that validates after every second step."""
    tree["data"]["heldout_latents"] = str(heldout)
    tree["train"] |= {"total_samples": 48, "validate_every_samples": 32, "validate_samples": 19}
    return write_yaml(tree, tmp_path)


def test_it_is_equal_on_any_number_of_ranks_and_changes_nothing(validated, tree):
    alone = train_on_ranks(1, validated, "run.name=alone")
    assert [line["step"] for line in alone if "eval/loss" in line] == [2, 3]  # and at the last step
    assert alone[1].keys() >= TAGS
    assert alone[1]["eval/loss"] == pytest.approx(sum(alone[1][f"eval/loss_stage{k}"] for k in range(3)) / 3)

    # The same run without validation: the same losses to the bit.
    plain = train_on_ranks(1, validated, "run.name=plain", "train.validate_every_samples=0")
    assert losses(plain) == losses(alone)
    assert not any("eval/loss" in line for line in plain)

    # A different number of ranks, ZeRO stage and micro-batch.
    settings = ("deepspeed.zero_stage=3", "batch.micro_batch_size=4")
    pair = train_on_ranks(2, validated, "run.name=pair", *settings)
    for line, other in zip(alone, pair, strict=True):
        tags = TAGS & line.keys()
        assert {tag: other[tag] for tag in tags} == pytest.approx({tag: line[tag] for tag in tags}, abs=2e-5)
    bare = train_on_ranks(2, validated, "run.name=bare", *settings, "train.validate_every_samples=0")
    assert losses(bare) == losses(pair)  # also if the weights are sharded


def test_the_log_shows_it_and_a_resumed_run_has_the_same(validated):
    train_alone(validated, "train.total_samples=32")
    said, _ = train_alone(validated, "train.total_samples=64")
    whole = train_on_ranks(1, validated, "run.name=whole", "train.total_samples=64")
    assert any("step 4/4" in line and f"validation {whole[3]['eval/loss']:.4f}" in line for line in said)


@pytest.mark.parametrize(("kind", "num_stages"), KINDS)
def test_the_losses_depend_on_key_and_time_alone(kind, num_stages):
    config = make_config(kind, num_stages=num_stages)
    compute = objective(config, make_model(config))
    moments, labels, positions = batch(range(6))

    def losses_at(time, rows=slice(None)):
        return compute.heldout_losses(moments[rows], labels[rows], positions[rows], time, compute._normalise)

    whole = losses_at(0.5)
    assert whole.shape == (6, num_stages)
    assert torch.allclose(losses_at(0.5, [4, 1]), whole[[4, 1]], atol=1e-5)
    assert kind == "par" or not torch.allclose(losses_at(0.25), whole)  # the loss of codes has no time
    reseeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
    other = objective(reseeded, compute.model)
    assert torch.equal(other.heldout_losses(moments, labels, positions, 0.5, compute._normalise), whole)


def test_latents_that_do_not_fit_are_refused(validated, heldout):
    from ecar_dist.config.read import load_config

    assert check_heldout(load_config(validated), str(heldout), None).count == 359
    with pytest.raises(DataError, match=r"data\.num_classes=4.*10"):
        check_heldout(load_config(validated, ["data.num_classes=4"]), str(heldout), None)
    with pytest.raises(DataError, match="autoencoder"):
        check_heldout(load_config(validated), str(heldout), IDENTITY)
