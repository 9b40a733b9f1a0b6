"""What calibration records: maxima by place and half, the same on one rank and on two; outlier tokens."""

import torch
from safetensors.torch import load_file
from torch import nn

from ecar_dist.cli import main
from ecar_dist.compress.calibration import Calibration, calibrate
from ecar_dist.compress.model import Recipe, quantized_unit
from ecar_dist.compress.run import units_with_outliers
from ecar_dist.quantize.linear import QuantizedLinear
from ecar_dist.quantize.quantizer import sqnr
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.world import World
from ecar_dist.sample.load import open_trained
from tests.conftest import free_port
from tests.fork_server import run_ranks

CPU = torch.device("cpu")


def test_maxima_are_kept_by_place_and_half():
    found = Calibration()
    x = torch.tensor([[[1.0, -2.0], [0.5, 0.0]], [[-8.0, 1.0], [0.0, 3.0]]])  # [2, 2, 2]
    found.see("layer", "stage0/maps", x, torch.tensor([False, True]))
    found.see("layer", "stage0/maps", -0.5 * x, torch.tensor([False, True]))
    assert {key: value.tolist() for key, value in found.channels.items()} == {
        "layer|stage0/maps|cond": [1.0, 2.0],
        "layer|stage0/maps|null": [8.0, 3.0],
    }
    assert found.largest("layer").tolist() == [8.0, 3.0]


def test_a_channel_that_rests_in_one_place_does_not_explode_in_another():
    torch.manual_seed(0)
    linear = nn.Linear(16, 16).requires_grad_(False)
    busy = torch.randn(64, 1, 16)
    resting = torch.cat((busy[..., :1] * 1e-4, busy[..., 1:]), dim=-1)  # channels differ most here
    found = Calibration()
    for place, x in (("stage0/maps", resting), ("stage1/maps", busy)):
        found.see("layer", place, x, None)
    holder = nn.ModuleDict({"layer": linear})
    made = quantized_unit(holder, ("layer",), 8, found, Recipe(alpha=0.5))["layer"]
    assert sqnr(linear(busy), made(busy)) > 35


def test_every_stage_time_and_half_of_the_sampler_is_seen(run):
    trained = open_trained(run, CPU)
    found = calibrate(trained, World(Placement(), CPU), images=2, batch_size=2, seed=0)
    places = {key.partition("|")[2] for key in found.channels if key.startswith("flow.transformer.blocks.0.mlp.0|")}
    assert {place.partition("/")[0] for place in places} == {"stage0", "stage1", "stage2"}
    assert {"stage0/time0|cond", "stage2/time6|null"} <= places
    assert {place.rpartition("|")[2] for place in places} == {"cond", "null"}
    assert found.is_in_flow("flow.transformer.blocks.0.mlp.0")
    assert not found.is_in_flow("flow.condition_projection")
    assert not found.is_in_flow("ar.transformer.blocks.0.mlp.0")
    assert set(found.mean_incoherence()) == {f"stage{k} {net}" for k in range(3) for net in ("token maps", "velocity")}


def test_a_constant_outlier_token_keeps_its_keys_and_values():
    x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    planted = x.clone()
    planted[:, 5] *= 200.0
    sometimes = x.clone()
    sometimes[0, 5] *= 200.0
    for tokens, expected in ((x, []), (sometimes, []), (planted, [5])):
        found = Calibration()
        found.see("a.qkv", "stage1/maps", tokens, None)
        assert found.outlier_tokens() == ({"a.qkv|stage1/maps|16 tokens": expected} if expected else {})
        assert units_with_outliers(["a.qkv", "a.out"], found) == ({"a.qkv"} if expected else set())


def test_a_quantised_layer_shows_its_transformed_input():
    torch.manual_seed(0)
    made = QuantizedLinear.of(nn.Linear(8, 8), 8, balance=torch.full((8,), 2.0))
    assert torch.equal(made.transformed(torch.ones(1, 8)), torch.full((1, 8), 0.5))


def test_two_ranks_calibrate_as_one(run, tmp_path):
    def words(name):
        options = ["--images", "3", "--batch-size", "1", "--calibration", str(tmp_path / f"{name}.safetensors")]
        return ["quantize", str(run), str(tmp_path / name), *options]

    ended = run_ranks(2, free_port(), *words("two"))
    assert not any(rank.returncode for rank in ended), "".join(rank.stdout + rank.stderr for rank in ended)
    assert main(words("one")) == 0
    for name in ("one/model.safetensors", "one.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(tmp_path / name.replace("one", "two"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_rank_draws_its_own_batches_alone(run, monkeypatch):
    trained = open_trained(run, CPU)
    drawn = []
    monkeypatch.setattr("ecar_dist.compress.calibration.generate", lambda *given: drawn.append(given[3].tolist()))
    monkeypatch.setattr(World, "together", lambda self, action: action())
    monkeypatch.setattr(Calibration, "reduce", lambda self, world: None)
    for rank in range(2):
        calibrate(trained, World(Placement(rank, 2, rank, 2), CPU), images=5, batch_size=2, seed=0)
    assert drawn == [[0, 1], [4], [2, 3]]
