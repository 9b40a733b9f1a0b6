"""An export computes what its run computes, and one that does not is removed."""

import dataclasses
import json
import math

import pytest
import torch

from ecar_dist.errors import CheckpointError
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.export.ema import WantedEma
from ecar_dist.runtime.export.files import ExportReader
from ecar_dist.runtime.export.write import export_run
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.sample.generate import velocities
from ecar_dist.sample.load import load_weights, open_trained
from ecar_dist.sample.parity import parity_report
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.vae.build import open_codec
from tests.pretend_device import DEVICE, PretendDevice
from tests.runtime.made_runs import DATA, make_checkpoint, make_run
from tests.train.test_objective import make_config, make_model

CPU = torch.device("cpu")


def random_weights(config, seed):
    """For every parameter of the config's model; as if trained: none is zero."""
    model = kind_of(config).build_model(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smallest ECAR that keeps two averages."""
    return make_trained(tmp_path_factory.mktemp("parity"))


def make_trained(folder, **sections):
    folder, config = make_run(folder, ema={"half_life_samples": [1000, 2000]}, **sections)
    codec = open_codec(config.vae, CPU)
    identity = {
        "model": {**config.model_identity, "encoder.weights_sha256": codec.identity.weights_sha256},
        "data": DATA,
    }
    state = {kind: random_weights(config, seed) for seed, kind in enumerate(("ema", "ema1"))}
    make_checkpoint(folder / "checkpoints", 6, state, identity=identity, ema=config.ema)
    return folder


def differences(out):
    return json.loads((out / "parity.json").read_text())["max_abs_difference"]


@pytest.mark.parametrize("max_shard_gib", [5.0, 2**-10])
def test_fp32_is_equal_to_the_last_bit(run, tmp_path, max_shard_gib):
    exported = export_run(run, tmp_path / "out", max_shard_gib=max_shard_gib)
    assert (len(list(exported.path.glob("*.safetensors"))) > 1) == (max_shard_gib < 1)
    assert parity_report(exported) == "parity: weights, velocities of 3 stages and 4 samples equal the run's"
    assert differences(exported.path) == {"weights": [0.0], "velocity": [0.0] * 3, "samples": [0.0] * 3}
    rms = json.loads((exported.path / "parity.json").read_text())["rms"]
    assert min(rms["velocity"] + rms["samples"]) > 0.1  # the inputs do reach the outputs


def test_bf16_states_its_difference(run, tmp_path):
    exported = export_run(run, tmp_path / "out", dtype="bf16")
    line = parity_report(exported)
    found = differences(exported.path)
    (weights,) = found["weights"]
    assert 0 < weights < 0.3 * 2**-8  # half a unit in the last of 8 bits, for weights up to about 0.25
    assert all(0 < value < 0.1 for value in found["velocity"] + found["samples"])
    assert line.startswith(f"parity: weights differ by {weights:.3g}, velocities by ")


@pytest.mark.parametrize(
    ("kind", "num_stages", "said"),
    [("dit", 1, "1 stage"), ("pyramid", 3, "3 stages"), ("mar", 1, "1 stage"), ("par", 1, "1 stage")],
)
def test_every_kind_is_exported_and_opens_like_its_run(tmp_path, kind, num_stages, said):
    run = make_trained(tmp_path, model={"kind": kind, "flow_depth": 2}, flow={"num_stages": num_stages})
    exported = export_run(run, tmp_path / "out")
    assert parity_report(exported) == f"parity: weights, velocities of {said} and 4 samples equal the run's"
    assert differences(exported.path) == {
        "weights": [0.0],
        "velocity": [0.0] * num_stages,
        "samples": [0.0] * num_stages,
    }
    rms = json.loads((exported.path / "parity.json").read_text())["rms"]
    assert min(rms["velocity"] + rms["samples"]) > (0.02 if kind == "par" else 0.1)  # logits, and codes of std 0.05
    ours, theirs = open_trained(run, CPU), open_trained(exported.path, CPU)
    assert theirs.config.model.kind == kind
    expected = ours.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in theirs.model.state_dict().items())
    card = (exported.path / "README.md").read_text()
    assert f"\n- {kind}\n" in card
    assert "ECAR" not in card
    assert f"images in {said}, " in card


@pytest.mark.parametrize(
    ("kind", "num_stages"),
    [("ecar", 3), ("dit", 1), ("pyramid", 3), ("mar", 1), ("par", 1), ("par_cont", 1), ("hybrid", 1)],
)
def test_the_velocities_depend_on_every_weight(kind, num_stages):
    """No part of a model is left out of the comparison: if any parameter differs, some velocity does."""
    config = make_config(kind, num_stages=num_stages)
    model, plan = make_model(config), SamplingPlan.from_config(config, CPU)
    indices, labels = torch.arange(4), torch.tensor([0, 1, 2, 10])
    before = velocities(model, plan, labels, indices, 0)
    for name, parameter in model.named_parameters():
        held = parameter.detach().clone()
        parameter.data.add_(0.1 * torch.randn_like(held))
        after = velocities(model, plan, labels, indices, 0)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
        parameter.data.copy_(held)


@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_an_export_that_differs_is_removed(run, tmp_path, monkeypatch, value):
    exported = export_run(run, tmp_path / "out")
    read = ExportReader.__getitem__
    monkeypatch.setattr(
        ExportReader, "__getitem__", lambda self, name: read(self, name) + (value if name.endswith("weight") else 0)
    )
    with pytest.raises(CheckpointError, match=r"out was removed: weights .* (0.001|nan), "):
        parity_report(exported)
    assert not exported.path.exists()


def test_the_weights_of_another_average_are_seen(run, tmp_path):
    first, second = export_run(run, tmp_path / "a"), export_run(run, tmp_path / "b", wanted=WantedEma(half_life=2000))
    with pytest.raises(CheckpointError, match=r"was removed: weights .* 0"):
        parity_report(dataclasses.replace(first, weights=second.weights))
    assert not first.path.exists()


def test_an_export_opens_like_its_run(run, tmp_path):
    out = export_run(run, tmp_path / "out", max_shard_gib=2**-10).path
    ours, theirs = open_trained(run, CPU), open_trained(out, CPU)
    assert theirs.source == out
    assert ours.source.name == "step-00000006"
    assert theirs.progress == ours.progress
    expected = ours.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in theirs.model.state_dict().items())


def test_a_model_is_loaded_onto_its_device_without_drawing_weights_first(run):
    config = RunDirectory(run).load_config()
    weights = random_weights(config, 0)
    with PretendDevice() as pretended:
        model = load_weights(config, weights, DEVICE)
        loaded = {name: value.cpu() for name, value in model.state_dict().items()}
    assert set(+pretended.on_host) <= {"detach"}  # of the weights
    assert not model.training
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_weights_of_another_model_are_refused_in_one_line(run):
    config = RunDirectory(run).load_config()
    weights = random_weights(config, 0)
    name = next(iter(weights))
    for change, said in [
        ({name: torch.zeros(3)}, rf"parameter {name} is \[3\] .* \[[\d, ]+\]"),
        ({"new": torch.zeros(3)}, "parameter new .* weights"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            load_weights(config, {**weights, **change}, CPU)
    del weights[name]
    with pytest.raises(CheckpointError, match=f"parameter {name} .* model"):
        load_weights(config, weights, CPU)
