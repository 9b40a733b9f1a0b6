"""Token merging in the sampler: off, it is exact; on, only the last stage of the flow computes on fewer tokens."""

import dataclasses

import pytest
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.errors import ConfigError
from ecar_dist.sample.fast import prepare
from ecar_dist.sample.generate import generate
from ecar_dist.sample.options import with_settings
from tests.quantize.test_layers_of_a_model import TREE
from tests.sample.test_fast import CPU, small
from tests.sample.test_generate import INDICES, LABELS, SEED


class TokenCounts:
    """Records the number of tokens of every input of a module."""

    def __init__(self, module):
        self.counts = []
        module.register_forward_hook(lambda module, inputs, output: self.counts.append(inputs[0].shape[1]))


def stages_of(model, plan, **changes):
    return generate(model, dataclasses.replace(plan, **changes), LABELS, INDICES, SEED)


def test_no_merging_is_exact_and_leaves_no_hook():
    model, plan = small("ecar", 2)
    ours = stages_of(model, plan, merge_ratio=0.5)
    theirs, off = stages_of(model, plan), stages_of(model, plan, merge_ratio=0.0)
    assert all(torch.equal(a, b) for a, b in zip(theirs, off, strict=True))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])
    assert ours[1].isfinite().all()


@pytest.mark.parametrize("kind", ["ecar", "dit"])
def test_the_last_stage_of_the_flow_alone_has_fewer_tokens_after_its_first_call(kind):
    stages = 2 if kind == "ecar" else 1
    model, plan = small(kind, stages)
    block = model.flow.transformer.blocks[0]
    attention, mlp, whole = TokenCounts(block.attention), TokenCounts(block.mlp), TokenCounts(block)
    token_map = TokenCounts(model.ar.transformer.blocks[0].attention) if kind == "ecar" else None
    stages_of(model, plan, merge_ratio=0.5)
    calls = [count for count in whole.counts if count == 64]
    assert len(calls) == 4
    expected = [16] * (len(whole.counts) - 4) + [64, 32, 32, 32]
    assert attention.counts == mlp.counts == expected
    if token_map is not None:
        assert token_map.counts == [16, 64]


def test_the_difference_from_the_samples_without_grows_with_the_ratio():
    model, plan = small("dit", 1)
    exact = stages_of(model, plan)[-1]
    errors = [float((stages_of(model, plan, merge_ratio=ratio)[-1] - exact).norm()) for ratio in (0.0, 0.25, 0.75)]
    assert 0.0 == errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("mar", {"merge-ratio": "0.5"}, "model.kind=mar cannot merge"),
        ("ecar", {"merge-ratio": "0.5", "guidance-scale": "1"}, "needs guidance"),
        ("ecar", {"merge-ratio": "0.9"}, "0.75"),
    ],
)
def test_what_cannot_be_merged_is_refused(kind, settings, named):
    stages = {"flow": {"num_stages": 1}} if kind == "mar" else {}
    config = config_from_dict({**TREE, **stages, "model": {**TREE["model"], "kind": kind}})
    with pytest.raises(ConfigError, match=named):
        with_settings(config, settings)


def test_it_cannot_be_compiled():
    model, plan = small("dit", 1)
    with pytest.raises(ConfigError, match="leave --compile out"):
        prepare(model, dataclasses.replace(plan, merge_ratio=0.5), CPU, compiles=True)
