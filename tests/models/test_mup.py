"""Maximal update parametrisation: after some steps, a wide model computes values as large as a narrow one's."""

import math

import pytest
import torch

from ecar_dist.config.read import config_from_dict
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import INIT_STD, Linear, parameter_groups

WIDTHS = (64, 256)
STEPS, BATCH, SIDE = 4, 4, 8


def config(width, *, mup=True, kind="ecar", **optim):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"kind": kind, "preset": "T", "width": width, "ar_depth": 2, "flow_depth": 2},
            "flow": {"num_stages": 1 if kind in ("dit", "mar") else 2},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 4, "latent_size": SIDE, "latent_channels": 4},
            "train": {"total_samples": 256},
            "optim": {"mup": mup, "mup_base_width": WIDTHS[0], **optim},
        }
    )


def built(width, **options):
    torch.manual_seed(0)
    chosen = config(width, **options)
    return kind_of(chosen).build_model(chosen)


def test_the_base_model_is_the_same_with_and_without():
    with_it, without = built(WIDTHS[0]), built(WIDTHS[0], mup=False)
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))
    groups = [parameter_groups(model, 0.1) for model in (with_it, without)]
    assert [[(g["rate"], g["weight_decay"], len(g["params"])) for g in some] for some in groups] == [
        [(1.0, 0.1, len(some[0]["params"])), (1.0, 0.0, len(some[1]["params"]))] for some in groups
    ]


def test_matrices_with_growing_inputs_start_smaller_and_learn_slower():
    model = built(WIDTHS[1])
    rates = {id(p): g["rate"] for g in parameter_groups(model, 0.1) for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in parameter_groups(model, 0.1) for p in g["params"]}
    named = dict(model.named_parameters())

    # Hidden, and at the output: the width is four times that of the base model.
    hidden = ("ar.transformer.blocks.0.attention.qkv", "flow.transformer.blocks.1.mlp.2", "flow.condition_projection")
    output = ("flow.output", "flow.transformer.head_modulation.project", "flow.transformer.blocks.0.modulation.project")
    for name in (*hidden, *output):
        weight = named[f"{name}.weight"]
        assert rates[id(weight)] == 1 / 4
        assert decays[id(weight)] == pytest.approx(0.1 * 4)
        assert rates[id(named[f"{name}.bias"])] == 1
    for name in hidden:
        assert named[f"{name}.weight"].std().item() == pytest.approx(INIT_STD / math.sqrt(4), rel=0.05)

    # At the input, and tables: nothing changes.
    for name in ("ar.context_projection", "flow.state_projection", "flow.time_embedding.mlp.0", "ar.class_embedding"):
        weight = named[f"{name}.weight"]
        assert rates[id(weight)] == 1
        assert weight.std().item() == pytest.approx(INIT_STD, rel=0.1)


def sizes_after_steps(width, *, mup, learning_rate=3e-3):
    """RMS of what the blocks and the output compute after some steps of Adam on one batch."""
    model = built(width, mup=mup)
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(BATCH, 4, side, side, generator=generator) for side in (SIDE // 2, SIDE)]
    targets = [torch.randn(state.shape, generator=generator) for state in states]
    times = [torch.rand(BATCH, generator=generator) for _ in states]
    labels = torch.arange(BATCH) % 4
    groups = [{**group, "lr": learning_rate * group["rate"]} for group in parameter_groups(model, 0.0)]
    optimizer = torch.optim.AdamW(groups)

    found = {}

    def remember(name):
        return lambda module, inputs, output: found.__setitem__(name, output.detach().pow(2).mean().sqrt().item())

    watched = ("ar.transformer.blocks.1", "flow.transformer.blocks.0", "flow.transformer.blocks.1", "flow.output")
    for name in watched:
        model.get_submodule(name).register_forward_hook(remember(name))
    for _ in range(STEPS):
        velocities = model(states[:1], states, times, labels)
        loss = sum((v - target).square().mean() for v, target in zip(velocities, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model(states[:1], states, times, labels)
    return found


def test_coordinates_keep_their_size_over_width():
    narrow, wide = (sizes_after_steps(width, mup=True) for width in WIDTHS)
    grown = {name: wide[name] / narrow[name] for name in narrow}
    assert all(1 / 2 < ratio < 2 for ratio in grown.values()), grown

    # The check can fail: with one rate for all widths, the output of the wide model grows faster.
    narrow, wide = (sizes_after_steps(width, mup=False) for width in WIDTHS)
    assert wide["flow.output"] / narrow["flow.output"] > 2


def test_all_but_the_inputs_grow():
    model = built(WIDTHS[1])
    fixed = {name for name, one in model.named_modules() if isinstance(one, Linear) and one.width_ratio == 1}
    assert fixed == {"ar.context_projection", "flow.state_projection", "flow.time_embedding.mlp.0"}
    assert {one.width_ratio for one in model.modules() if isinstance(one, Linear)} == {1.0, 4.0}


@pytest.mark.parametrize(
    ("wrong", "key"),
    [({"kind": "mar"}, "optim.mup"), ({"width": 100}, "model.width")],
)
def test_what_cannot_be_widened_is_refused(wrong, key):
    with pytest.raises(ConfigError, match=key):
        config(**{"width": 64, **wrong})
