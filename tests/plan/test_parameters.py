import pytest
import torch

from ecar_dist.models.build import build_model
from ecar_dist.models.presets import PRESETS
from ecar_dist.plan.kinds import KINDS, parameter_count
from ecar_dist.plan.parameters import dit_parameters, ecar_parameters

PARTS = {"ecar": ("ar", "flow"), "dit": (None, "flow"), "pyramid": (None, "flow"), "mar": ("trunk", "head")}


def built(config):
    with torch.device("meta"):
        model = build_model(config, (1.0,) * (config.flow.num_stages - 1))
    parts = [getattr(model, name) if name else torch.nn.Identity() for name in PARTS[config.model.kind]]
    counts = tuple(sum(p.numel() for p in part.parameters()) for part in parts)
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    return counts


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("kind", "num_stages"), [("ecar", 3), ("dit", 1), ("pyramid", 3), ("pyramid", 2), ("mar", 1)])
def test_every_kind_counts_what_it_builds(make_config, kind, num_stages, preset):
    config = make_config(model={"kind": kind, "preset": preset}, flow={"num_stages": num_stages})
    count = parameter_count(config)
    assert (count.ar, count.flow) == built(config)


@pytest.mark.parametrize("kind", KINDS)
def test_depths_of_the_config_are_built_and_counted(make_config, kind):
    flow = {"num_stages": 1}
    own = make_config(model={"kind": kind, "preset": "T", "ar_depth": 5, "flow_depth": 7}, flow=flow)
    count, usual = parameter_count(own), parameter_count(make_config(model={"kind": kind, "preset": "T"}, flow=flow))
    assert (count.ar, count.flow) == built(own)
    assert count.flow > usual.flow
    assert (count.ar != usual.ar) == (usual.ar > 0)


def test_mar_at_b_has_about_the_size_of_mar_b(make_config):
    """MAR-B has 208 M with a head 1024 wide (README of LTH14/mar); ours is 768 wide."""
    config = make_config(model={"kind": "mar", "preset": "B"}, flow={"num_stages": 1})
    assert parameter_count(config).total / 1e6 == pytest.approx(208, rel=0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_formula_equals_the_module(make_config, preset):
    config = make_config(preset)
    count = ecar_parameters(PRESETS[preset], config.stage_tokens, 16, 1000)
    assert (count.ar, count.flow) == built(config)
    assert count.total == count.ar + count.flow


@pytest.mark.parametrize(("num_stages", "mode"), [(1, "noisy_state"), (2, "class_only"), (4, "noisy_state")])
def test_formula_follows_stages_and_context(make_config, num_stages, mode):
    config = make_config("T", flow={"num_stages": num_stages, "context": {"mode": mode}})
    count = ecar_parameters(PRESETS["T"], config.stage_tokens, 16, 1000, feeds_state=mode != "class_only")
    assert (count.ar, count.flow) == built(config)


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(12, 384, 33), (12, 768, 130), (24, 1024, 458), (28, 1152, 675)]
)
def test_dit_sizes(depth, width, millions):
    """E15: the sizes in DiT's table 1."""
    assert dit_parameters(depth, width) / 1e6 == pytest.approx(millions, rel=0.01)
