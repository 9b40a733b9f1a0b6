import pytest
import torch
from torch import nn

from ecar_dist.config.knobs_training import TrainSection
from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.kinds.flow_head import trunk_size_of
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import weight_decay_groups

MILLIONS = {  # AR, velocity network, total: docs/ecar.md section 10
    "S": (23, 33, 56),
    "B": (91, 130, 221),
    "L": (211, 382, 594),
    "XL": (235, 675, 911),
    "XXL": (701, 1200, 1901),
    "3B": (1245, 1856, 3101),
    "7B": (3252, 3948, 7200),
}
HEAD_WIDTH = {"S": 64, "B": 64, "L": 64, "XL": 72, "XXL": 64, "3B": 128, "7B": 128}


def config(preset: str = "T", mode: str = "noisy_state", num_stages: int = 3, **model: object) -> RunConfig:
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"preset": preset, **model},
            "flow": {"num_stages": num_stages, "context": {"mode": mode}},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 1000},
            "train": {"total_samples": 256},
        }
    )


def build_model(config: RunConfig) -> nn.Module:
    return kind_of(config).build_model(config)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", MILLIONS)
def test_presets_have_the_stated_sizes(preset):
    with torch.device("meta"):
        model = build_model(config(preset))
    for built, stated in zip((count(model.ar), count(model.flow), count(model)), MILLIONS[preset], strict=True):
        assert built / 1e6 == pytest.approx(stated, rel=0.01)
    for network in (model.ar, model.flow):  # the number of heads does not change the size
        attention = network.transformer.blocks[0].attention
        assert attention.qkv.in_features / attention.heads == HEAD_WIDTH[preset]


def test_class_only_reads_no_state():
    model = build_model(config(mode="class_only"))
    assert not hasattr(model.ar, "context_projection")
    assert model.ar.start_positions.num_embeddings == 336


def test_build_is_a_function_of_the_seed():
    torch.manual_seed(0)
    first = build_model(config()).state_dict()
    torch.manual_seed(0)
    second = build_model(config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_matrices_decay():
    model = build_model(config("S"))
    decay, no_decay = weight_decay_groups(model)
    assert sorted(map(id, decay + no_decay)) == sorted(map(id, model.parameters()))
    chosen = {id(parameter) for parameter in decay}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert all(parameter.ndim == 2 for parameter in decay)
    assert "flow.class_embedding.weight" not in names
    assert "ar.output_positions.weight" not in names
    assert "flow.output.weight" in names
    assert "ar.context_projection.weight" in names


def test_activation_checkpointing_reaches_both_networks():
    plain = build_model(config())
    assert not plain.ar.transformer.recompute
    assert not plain.flow.transformer.recompute
    recomputing = config().model_copy(update={"train": TrainSection(total_samples=1, activation_checkpointing=True)})
    model = build_model(recomputing)
    assert model.ar.transformer.recompute
    assert model.flow.transformer.recompute


@pytest.mark.parametrize(
    ("kind", "num_stages", "parts"),
    [("dit", 1, ["flow"]), ("pyramid", 3, ["flow"]), ("mar", 1, ["trunk"])],
)
def test_activation_checkpointing_reaches_every_kind(kind, num_stages, parts):
    for on in (False, True):
        chosen = config(kind=kind, num_stages=num_stages)
        chosen = chosen.model_copy(update={"train": TrainSection(total_samples=1, activation_checkpointing=on)})
        model = build_model(chosen)
        assert [getattr(model, part).transformer.recompute for part in parts] == [on] * len(parts)


def test_depths_of_the_config_replace_the_presets():
    model = build_model(config(ar_depth=2, flow_depth=5))
    assert (len(model.ar.transformer.blocks), len(model.flow.transformer.blocks)) == (2, 5)
    mar = build_model(config(kind="mar", num_stages=1, ar_depth=2, flow_depth=5))
    assert (len(mar.trunk.transformer.blocks), len(mar.head.blocks)) == (2, 5)


def test_mar_has_both_depths_in_its_trunk_and_a_quarter_in_its_head():
    sizes = [trunk_size_of(config(preset, kind="mar", num_stages=1)) for preset in ("T", "B", "L", "XL")]
    found = [(size.depth, size.width, size.heads, size.head_depth) for size in sizes]
    assert found == [(7, 128, 4, 3), (24, 768, 12, 6), (36, 1024, 16, 9), (42, 1152, 16, 10)]


def test_only_the_matrices_of_mar_decay():
    model = build_model(config("T", kind="mar", num_stages=1))
    decay = {id(parameter) for parameter in weight_decay_groups(model)[0]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decay}
    assert {"trunk.state_projection.weight", "head.blocks.0.mlp.0.weight", "head.output.weight"} <= names
    assert not {"trunk.mask_vector.weight", "trunk.positions.weight", "trunk.class_embedding.weight"} & names
