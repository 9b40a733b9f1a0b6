"""A model filled from another model's weights: what fits, and what is refused."""

from pathlib import Path

import pytest
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.errors import CheckpointError
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.initial.load import plan_transfers, transfer_lines
from ecar_dist.runtime.initial.source import InitialWeights


def make_config(kind="ecar", preset="T", size=4, classes=3, flow_depth=1, codes=16, **flow):
    return config_from_dict(
        {
            "run": {"name": "x"},
            "model": {
                "kind": kind,
                "preset": preset,
                "patch_size": 1,
                "ar_depth": 1,
                "flow_depth": flow_depth,
                "codebook_size": codes,
            },
            "flow": flow,
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": classes, "latent_channels": 2, "latent_size": size},
            "train": {"total_samples": 1},
        }
    )


def made_source(config, names=None):
    torch.manual_seed(1)
    weights = {name: p.detach() for name, p in kind_of(config).build_model(config).named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return InitialWeights(Path("source"), weights, shapes, "made", "0", config=config, class_names=names)


def filled(config, source, names=None):
    """Name -> (values, known rows) of the parameters that come from the source."""
    transfers = plan_transfers(config, source, names)
    assert all(transfer_lines(config, source, transfers))
    made = {one.name: one.convert(source.weights[one.name]) for one in transfers if one.from_source}
    assert all(made[one.name].values.shape == one.shape for one in transfers if one.from_source)
    return made


@pytest.mark.parametrize("kind", ["ecar", "pyramid", "dit", "mar", "par", "par_cont", "hybrid"])
def test_the_same_model_takes_everything(kind):
    config = make_config(kind, num_stages=1 if kind not in ("ecar", "pyramid") else 2)
    source = made_source(config)
    made = filled(config, source)
    assert made.keys() == source.weights.keys()
    assert all(torch.equal(one.values, source.weights[name]) and one.known.all() for name, one in made.items())


def test_other_classes_another_resolution_and_other_stages():
    source = made_source(make_config(num_stages=2), ["a", "b", "c"])
    larger = filled(make_config(num_stages=2, size=8, classes=2), source, ["c", "d"])
    assert larger["ar.class_embedding.weight"].known.tolist() == [True, False, True]
    assert larger["ar.output_positions.weight"].known.all()
    more = filled(make_config(num_stages=3), source)
    assert more["flow.stage_embedding.weight"].known.tolist() == [False, True, True]
    one = plan_transfers(make_config(num_stages=2), made_source(make_config(num_stages=1)), None)
    assert {transfer.name for transfer in one if not transfer.from_source} == {
        "ar.context_projection.weight",
        "ar.context_projection.bias",
    }


@pytest.mark.parametrize(
    ("other", "number"),
    [
        (make_config(preset="S", num_stages=2), "384"),
        (make_config("pyramid", num_stages=2), "pyramid"),
        (make_config(num_stages=1, size=16), "[16]"),
        (make_config(num_stages=2, flow_depth=2), "flow_depth=2"),
    ],
)
def test_another_width_depth_or_kind_is_refused_with_the_numbers(other, number):
    with pytest.raises(CheckpointError, match=r"train\.init_from=source") as refused:
        plan_transfers(make_config(num_stages=2), made_source(other), None)
    assert number in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_codebook_of_another_size_is_refused_with_the_setting():
    theirs, ours = (make_config("hybrid", codes=codes, num_stages=1) for codes in (16, 32))
    with pytest.raises(CheckpointError, match=r"codebook_size=16.*set model\.codebook_size=16"):
        plan_transfers(ours, made_source(theirs), None)


def test_a_file_without_a_config_needs_the_same_parameters():
    config = make_config(num_stages=2)
    same, other = (made_source(one) for one in (config, make_config(num_stages=2, classes=4)))
    same, other = (InitialWeights(one.path, one.weights, one.shapes, "file", "0") for one in (same, other))
    assert len(filled(config, same)) == len(same.weights)
    with pytest.raises(CheckpointError, match=r"\[5, 128\].*\[4, 128\]"):
        plan_transfers(config, other, None)
