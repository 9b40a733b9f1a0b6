"""What `submit` refuses because of its memory, and that its suggestions fit."""

import re
from pathlib import Path

import pytest

from ecar_dist.cluster.fitness import fitness_lines
from ecar_dist.cluster.resources import Resources
from ecar_dist.config.read import load_config
from ecar_dist.errors import ConfigError

XL = "configs/imagenet256_xl.yaml"
LARGE = ["model.preset=7B"]


def refusal(overrides, resources, device="H100"):
    with pytest.raises(ConfigError) as error:
        fitness_lines(load_config(XL, overrides), resources, device)
    assert "\n" not in str(error.value)
    return str(error.value)


def suggestions(said):
    """The overrides of each alternative."""
    return [re.findall(r"[a-z_.]+=\S+?(?=,|\s|$)", part) for part in said.split("; use ")[1].split(", or ")]


def test_7b_with_micro_batch_32_dies_in_its_first_step_and_is_refused():
    said = refusal(LARGE, Resources(nodes=8))
    assert "batch.micro_batch_size=32" in said
    assert "on 64 ranks needs 98.4 GiB" in said
    assert "82.4 GiB activations" in said
    assert "73 GiB usable" in said
    assert suggestions(said) == [["train.activation_checkpointing=true"], ["batch.micro_batch_size=16"]]

    # Eager blocks keep more.
    said = refusal([*LARGE, "train.compile=false"], Resources(nodes=8))
    assert "on 64 ranks needs 136 GiB" in said
    assert suggestions(said) == [["train.activation_checkpointing=true"], ["batch.micro_batch_size=8"]]


@pytest.mark.parametrize(
    ("overrides", "resources", "device"),
    [
        (LARGE, Resources(nodes=8), "H100"),
        ([*LARGE, "train.compile=false"], Resources(nodes=8), "H200"),
        (LARGE, Resources(nodes=8, min_nodes=1), "A100"),
        ([*LARGE, "deepspeed.zero_stage=0"], Resources(nodes=8), "H100"),
        ([*LARGE, "deepspeed.zero_stage=1"], Resources(nodes=4), "H200"),
        ([*LARGE, "batch.micro_batch_size=256"], Resources(nodes=1), "H100"),
        ([*LARGE, "train.activation_checkpointing=true", "batch.micro_batch_size=256"], Resources(nodes=1), "H100"),
        (["model.preset=3B", "deepspeed.zero_stage=0", "batch.micro_batch_size=128"], Resources(nodes=2), "H100"),
        (["batch.micro_batch_size=2048"], Resources(nodes=1, gpus_per_node=1), "H100"),
    ],
)
def test_no_suggestion_would_be_refused(overrides, resources, device):
    offered = suggestions(refusal(overrides, resources, device))
    assert offered
    for changes in offered:
        assert fitness_lines(load_config(XL, [*overrides, *changes]), resources, device)


def test_without_zero_a_smaller_micro_batch_is_not_offered_in_bf16():
    """It would add up gradients in bf16, which training refuses."""
    overrides = ["deepspeed.zero_stage=0", "batch.micro_batch_size=128", "batch.global_batch_size=1024"]
    offered = suggestions(refusal(overrides, Resources(nodes=1)))
    assert ["train.activation_checkpointing=true"] in offered
    assert not [changes for changes in offered if len(changes) == 1 and "micro_batch" in changes[0]]


def test_where_nothing_fits_more_nodes_are_offered():
    said = refusal([*LARGE, "batch.micro_batch_size=1"], Resources(nodes=1, gpus_per_node=1))
    assert said.endswith("use more nodes, or a smaller model.preset")


def test_the_fewest_nodes_of_a_range_count():
    overrides = [*LARGE, "train.activation_checkpointing=true"]
    assert fitness_lines(load_config(XL, overrides), Resources(nodes=8), "H100")
    assert "on 8 ranks needs" in refusal([*overrides, "deepspeed.zero_stage=1"], Resources(nodes=8, min_nodes=1))


@pytest.mark.parametrize(("path", "nodes"), [(XL, 8), ("configs/imagenet256_b_dct.yaml", 1)])
def test_the_shipped_configs_fit_the_nodes_that_they_name(path, nodes):
    assert "x 8 GPUs" in Path(path).read_text()
    for device in ("A100", "H100", "H200"):
        lines = fitness_lines(load_config(path, []), Resources(nodes=nodes), device)
        assert any(line.endswith(": fits") for line in lines)
