import pytest
import torch
from torch import nn

from ecar_dist.config import RunConfig, TrainSection
from ecar_dist.config_file import config_from_dict
from ecar_dist.models.build import build_model, weight_decay_groups

MILLIONS = {  # AR, velocity network, total: docs/ecar.md section 10
    "S": (23, 33, 56),
    "B": (91, 130, 221),
    "L": (211, 382, 594),
    "XL": (235, 675, 911),
    "XXL": (701, 1200, 1901),
    "3B": (1245, 1856, 3101),
    "7B": (3252, 3948, 7200),
}


def config(preset: str = "T", mode: str = "noisy_state") -> RunConfig:
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"preset": preset},
            "flow": {"context": {"mode": mode}},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 1000},
            "train": {"total_samples": 256},
        }
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", MILLIONS)
def test_presets_have_the_stated_sizes(preset):
    with torch.device("meta"):
        model = build_model(config(preset), (1.0, 1.0))
    for built, stated in zip((count(model.ar), count(model.flow), count(model)), MILLIONS[preset], strict=True):
        assert built / 1e6 == pytest.approx(stated, rel=0.01)


def test_class_only_reads_no_state():
    model = build_model(config(mode="class_only"), (1.0, 1.0))
    assert not hasattr(model.ar, "context_projection")
    assert model.ar.start_positions.num_embeddings == 336


def test_build_is_a_function_of_the_seed():
    torch.manual_seed(0)
    first = build_model(config(), (1.0, 1.0)).state_dict()
    torch.manual_seed(0)
    second = build_model(config(), (1.0, 1.0)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_matrices_decay():
    model = build_model(config("S"), (1.0, 1.0))
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
    plain = build_model(config(), (1.0, 1.0))
    assert not plain.ar.transformer.recompute
    assert not plain.flow.transformer.recompute
    recomputing = config().model_copy(update={"train": TrainSection(total_samples=1, activation_checkpointing=True)})
    model = build_model(recomputing, (1.0, 1.0))
    assert model.ar.transformer.recompute
    assert model.flow.transformer.recompute
