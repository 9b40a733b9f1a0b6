"""The ladder of learning rates: its cost, and that its commands train narrower models."""

import shlex

import pytest

from ecar_dist.config.read import load_config
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.presets import preset_of
from ecar_dist.plan.ladder import ladder_lines

CONFIG = "configs/imagenet256_xl.yaml"
GIVEN = ["optim.mup=true", "optim.mup_base_width=288"]


def ladder(*overrides):
    return ladder_lines(load_config(CONFIG, list(overrides)), CONFIG, overrides)


def test_the_commands_are_runs_of_narrower_models():
    lines = ladder(*GIVEN)
    (loop,) = [line for line in lines if line.startswith("for width")]
    widths = loop.split(" in ")[1].split(";")[0].split()
    rates = loop.split(" in ")[2].split(";")[0].split()
    assert widths == ["288", "576"]
    assert [float(rate) for rate in rates] == [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]

    # As the shell reads it.
    at = lines.index(loop)
    command = (lines[at + 1].rstrip("\\") + lines[at + 2]).replace("$width", "576").replace("$rate", "4e-4")
    _, verb, path, *overrides = shlex.split(command)
    config = load_config(path, overrides)
    assert (verb, path) == ("train", CONFIG)
    assert (preset_of(config).flow_width, preset_of(config).flow_heads) == (576, 8)
    assert config.optim.learning_rate == 4e-4
    assert config.optim.mup
    assert config.train.total_samples == pytest.approx(0.1 * load_config(CONFIG).train.total_samples, rel=0.01)
    assert config.run.name.endswith("w576-lr4e-4")


@pytest.mark.parametrize("wrong", [[], ["optim.mup=true", "optim.mup_base_width=1152"]])
def test_without_narrower_models_of_mup_there_is_no_ladder(wrong):
    with pytest.raises(ConfigError, match=r"optim\.mup"):
        ladder(*wrong)
