import pytest
import torch

from ecar_dist.models.build import build_model
from ecar_dist.models.presets import PRESETS
from ecar_dist.plan.parameters import dit_parameters, ecar_parameters


def built(config):
    with torch.device("meta"):
        model = build_model(config, (1.0,) * (config.flow.num_stages - 1))
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model.ar, model.flow))


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
