"""Which layers are quantised: for every kind of model those in the blocks, but no embedders, adaLN or output."""

import pytest
import torch
from torch import nn

from ecar_dist.config.read import config_from_dict
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.quantize.layers import exchange_all, quantizable, shaped_like, tied_units
from ecar_dist.quantize.linear import QuantizedLinear

TREE = {
    "run": {"name": "tiny"},
    "model": {"preset": "T", "patch_size": 1, "ar_depth": 1, "flow_depth": 1},
    "vae": {"kind": "dct", "downsample": 8},
    "data": {"latents": "unused", "num_classes": 10, "latent_channels": 12, "latent_size": 4},
    "batch": {"global_batch_size": 4, "micro_batch_size": 4},
    "train": {"total_samples": 16},
}
KEPT = ("embedding", "state_projection", "context_projection", "modulation", "output")


def build(kind):
    stages = {"flow": {"num_stages": 1}} if KINDS[kind].one_stage else {}
    config = config_from_dict({**TREE, **stages, "model": {**TREE["model"], "kind": kind}})
    torch.manual_seed(0)
    return kind_of(config).build_model(config)


def test_of_ecar_the_blocks_and_the_projection_of_the_maps():
    block = ["attention.qkv", "attention.out", "mlp.0", "mlp.2"]
    names = [f"{part}.transformer.blocks.0.{layer}" for part in ("ar", "flow") for layer in block]
    assert set(quantizable(build("ecar"))) == {*names, "flow.condition_projection"}


@pytest.mark.parametrize("kind", KINDS)
def test_embedders_adaln_and_output_are_kept(kind):
    model = build(kind)
    names = set(quantizable(model))
    assert names
    assert not [name for name in names if any(word in name.split(".")[-1] for word in KEPT)]
    assert not [name for name in names if "modulation" in name or "time_embedding" in name]


def test_separate_projections_share_their_bits():
    names = ["a.q", "a.k", "a.v", "a.out", "b.qkv"]
    assert tied_units(names) == {"a.qkv": ("a.q", "a.k", "a.v"), "a.out": ("a.out",), "b.qkv": ("b.qkv",)}


def test_a_model_of_quantised_layers_takes_their_state():
    ours, theirs = build("ecar"), build("ecar")
    layers = {name: (4 if "mlp" in name else 8, False) for name in quantizable(ours)}
    before = exchange_all(
        ours, {name: QuantizedLinear.of(linear, layers[name][0]) for name, linear in quantizable(ours).items()}
    )
    assert set(before) == set(layers)
    shaped_like(theirs, layers)
    assert not quantizable(ours)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(theirs.get_submodule("flow.condition_projection"), QuantizedLinear)
    with pytest.raises(KeyError):
        shaped_like(theirs, {"flow.output": (8, False)})
    assert isinstance(theirs.flow.output, nn.Linear)
