import pytest
import torch

from ecar_dist.kinds.parameters import linear, time_embedding_parameters, transformer_parameters
from ecar_dist.kinds.presets import PRESETS
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.quantize.layers import quantizable

PARTS = {
    "ecar": ("ar", ("flow",)),
    "dit": (None, ("flow",)),
    "pyramid": (None, ("flow",)),
    "mar": ("trunk", ("head",)),
    "par": ("", ()),  # the whole model
    "par_cont": ("", ("head",)),
    "hybrid": ("", ("head", "code_projection", "residual_scale")),
}


def parameter_count(config):
    return kind_of(config).parameters(config)


def built(config):
    with torch.device("meta"):
        model = kind_of(config).build_model(config)
    first, second = PARTS[config.model.kind]
    total = sum(p.numel() for p in model.parameters())
    flow = sum(p.numel() for name in second for p in getattr(model, name).parameters())
    ar = total - flow if first == "" else sum(p.numel() for p in getattr(model, first).parameters()) if first else 0
    assert ar + flow == total
    return ar, flow


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("kind", "num_stages"),
    [("ecar", 3), ("dit", 1), ("pyramid", 3), ("pyramid", 2), ("mar", 1), ("par", 1), ("par_cont", 1), ("hybrid", 1)],
)
def test_every_kind_counts_what_it_builds(make_config, kind, num_stages, preset):
    config = make_config(model={"kind": kind, "preset": preset}, flow={"num_stages": num_stages})
    count = parameter_count(config)
    assert (count.ar, count.flow) == built(config)


@pytest.mark.parametrize(
    ("kind", "num_stages"),
    [("ecar", 3), ("dit", 1), ("pyramid", 3), ("mar", 1), ("par", 1), ("par_cont", 1), ("hybrid", 1)],
)
def test_every_kind_counts_the_weights_that_are_quantised(make_config, kind, num_stages):
    config = make_config(model={"kind": kind, "preset": "S"}, flow={"num_stages": num_stages})
    with torch.device("meta"):
        layers = quantizable(kind_of(config).build_model(config))
    assert parameter_count(config).quantized == sum(layer.weight.numel() for layer in layers.values()) > 0


@pytest.mark.parametrize(("kind", "num_stages"), [("ecar", 3), ("dit", 1)])
def test_average_velocities_add_one_embedding(make_config, kind, num_stages):
    config = make_config(model={"kind": kind}, flow={"num_stages": num_stages, "objective": "mean_velocity"})
    count = parameter_count(config)
    assert (count.ar, count.flow) == built(config)


@pytest.mark.parametrize("kind", KINDS)
def test_depths_of_the_config_are_built_and_counted(make_config, kind):
    flow = {"num_stages": 1}
    own = make_config(model={"kind": kind, "preset": "T", "ar_depth": 5, "flow_depth": 7}, flow=flow)
    count, usual = parameter_count(own), parameter_count(make_config(model={"kind": kind, "preset": "T"}, flow=flow))
    assert (count.ar, count.flow) == built(own)
    assert (count.flow > usual.flow) == (usual.flow > 0)
    assert (count.ar != usual.ar) == (usual.ar > 0)


def test_mar_at_b_has_about_the_size_of_mar_b(make_config):
    """MAR-B has 208 M with a head 1024 wide (README of LTH14/mar); ours is 768 wide."""
    config = make_config(model={"kind": "mar", "preset": "B"}, flow={"num_stages": 1})
    assert parameter_count(config).total / 1e6 == pytest.approx(208, rel=0.1)


@pytest.mark.parametrize(("num_stages", "mode"), [(1, "noisy_state"), (2, "class_only"), (4, "noisy_state")])
def test_formula_follows_stages_and_context(make_config, num_stages, mode):
    config = make_config("T", flow={"num_stages": num_stages, "context": {"mode": mode}})
    count = parameter_count(config)
    assert (count.ar, count.flow) == built(config)
    assert count.total == count.ar + count.flow


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(12, 384, 33), (12, 768, 130), (24, 1024, 458), (28, 1152, 675)]
)
def test_dit_sizes(depth, width, millions):
    """E15: the terms add up to the sizes in DiT's table 1: no QK-norm, 16 numbers in and 32 out, 1,000 classes."""
    count = transformer_parameters(depth, width, "per_block") + time_embedding_parameters(width)
    count += 1001 * width + linear(16, width) + linear(width, 32)
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
