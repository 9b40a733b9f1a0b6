"""Sensitivities of layers, measured by tasks that share a folder, and the bits that follow from them."""

import json
import math
import shutil

import pytest
import torch

from ecar_dist.cli import main
from ecar_dist.compress.mixed import candidates
from ecar_dist.compress.sensitivity import Sweep, items_of, measure_items
from ecar_dist.quantize.allocation import Unit, bits_of, mean_bits
from ecar_dist.runtime.export.files import read_facts
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.world import World
from ecar_dist.sample.load import open_trained

CPU = torch.device("cpu")
SMALL = ["--images", "2", "--batch-size", "2"]


def items_in(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*-w*.json")}


@pytest.fixture(scope="module")
def serial(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity") / "serial"
    assert main(["sensitivity", str(run), str(folder), *SMALL]) == 0
    return folder


def test_every_layer_has_a_damage_at_four_and_eight_bits(serial):
    items = items_in(serial)
    assert len(items) == 2 * 9
    assert len([item for item in items.values() if item["group"] == "quality"]) == 2 * 4
    assert items["flow.condition_projection-w4.json"]["group"] == "content"
    assert items["flow.transformer.blocks.0.mlp.0-w4.json"]["weights"] == 128 * 512
    for name, item in items.items():
        if item["bits"] == 4 and item["group"] == "quality":
            assert item["damage"] > 4 * items[name.replace("-w4", "-w8")]["damage"] > 0


def test_an_array_of_four_is_the_serial_run_in_any_order(run, serial, tmp_path, capsys):
    folder = tmp_path / "array"
    for task in (2, 0, 3, 1):
        words = ["sensitivity", str(run), str(folder), "--task", str(task), "--tasks", "4", *SMALL]
        assert main(words) == 0
    assert items_in(folder) == items_in(serial)

    # Again: what is missing or damaged is measured, nothing else is.
    (folder / "flow.condition_projection-w8.json").unlink()
    (folder / "flow.condition_projection-w4.json").write_text("{")
    capsys.readouterr()
    assert main(["sensitivity", str(run), str(folder), *SMALL]) == 0
    assert "2 measured; 18 of 18 items" in capsys.readouterr().out
    assert items_in(folder) == items_in(serial)


def test_the_branch_that_dominates_by_design_has_the_largest_damages(run, tmp_path):
    trained = open_trained(run, CPU)
    name = "flow.transformer.blocks.0.mlp.2"
    layer = trained.model.get_submodule(name)
    with torch.no_grad():
        layer.weight.mul_(30.0)
    sweep = Sweep(tmp_path, images=2, batch_size=2)
    calibration = sweep.open(trained, World(Placement(), CPU))
    weight = layer.weight.clone()
    items = [item for item in items_of(trained) if item[1] == 4 and item[0].startswith("flow.transformer")]
    assert measure_items(sweep, trained, calibration, items) == len(items) == 4
    assert trained.model.get_submodule(name) is layer
    assert torch.equal(layer.weight, weight)
    damage = {item["unit"]: item["damage"] for item in items_in(tmp_path).values()}
    of_mlp = [value for unit, value in damage.items() if ".mlp." in unit]
    of_attention = [value for unit, value in damage.items() if ".attention." in unit]
    assert min(of_mlp) > 100 * max(of_attention) > 0


def test_quantise_to_five_bits_on_average(run, serial, tmp_path, capsys):
    out = tmp_path / "five"
    words = [str(run), str(out), "--mean-bits", "5.0", "--sensitivity", str(serial), *SMALL]
    assert main(["quantize", *words]) == 0
    printed = capsys.readouterr().out
    assert "integer programme" in printed
    assert "additiv" in printed or "predicted" in printed

    report = json.loads((out / "quantization.json").read_text())
    assert report["mean_bits"] <= 5.0 + 1e-9
    assert report["mean_bits"] > 4.7
    rows = report["allocation"]["comparison"]
    assert set(rows) == {"integer programme", "uniform", "greedy by size", *(f"random {seed}" for seed in range(3))}
    assert all(row["mean bits"] <= 5.0 + 1e-9 for row in rows.values())
    assert report["paired"]["PSNR, dB"] == pytest.approx(rows["integer programme"]["PSNR, dB"])
    assert set(report["allocation"]["additivity"]) == {"content", "quality"}

    # The files have these bits.
    layers = read_facts(out).quantization.layers
    assert {name: layer.weights for name, layer in layers.items()} == {
        name: bits for name, bits in report["bits"].items() if bits < 16
    }
    assert main(["sample", str(out), "--labels", "1", "--count", "1", "--out", str(tmp_path / "drawn")]) == 0


def test_layers_of_outlier_tokens_keep_sixteen_bits_within_the_budget(run, serial, tmp_path, monkeypatch):
    key = "flow.transformer.blocks.0.attention.qkv|stage0/time0"
    monkeypatch.setattr("ecar_dist.compress.calibration.Calibration.outlier_tokens", lambda self: {key: [3]})
    out = tmp_path / "out"
    words = [str(run), str(out), "--mean-bits", "8", "--sensitivity", str(serial), *SMALL]
    assert main(["quantize", *words]) == 0
    report = json.loads((out / "quantization.json").read_text())
    assert report["bits"]["flow.transformer.blocks.0.attention.qkv"] == 16
    assert report["mean_bits"] <= 8.0 + 1e-9
    assert "flow.transformer.blocks.0.attention.qkv" not in read_facts(out).quantization.layers


def test_a_budget_that_the_layers_of_outlier_tokens_exceed_is_refused(run, serial, tmp_path, monkeypatch, capsys):
    keys = {
        f"{name}.attention.qkv|stage0/time0": [3] for name in ("flow.transformer.blocks.0", "ar.transformer.blocks.0")
    }
    monkeypatch.setattr("ecar_dist.compress.calibration.Calibration.outlier_tokens", lambda self: keys)
    words = [str(run), str(tmp_path / "out"), "--mean-bits", "4.5", "--sensitivity", str(serial), *SMALL]
    assert main(["quantize", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "4.5 bits per weight" in line
    assert "need at least" in line
    assert not (tmp_path / "out").exists()


def test_sensitivities_of_another_model_or_other_settings_are_refused(run, serial, tmp_path, capsys):
    def refusal(*options):
        capsys.readouterr()
        assert main(["sensitivity", str(run), str(serial), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "for weights " in refusal(*SMALL, "--ema", "ema1")
    assert "for settings images=2," in refusal("--images", "3", "--batch-size", "2")
    assert "--task 4 is outside 0..3" in refusal("--task", "4", "--tasks", "4")
    serial = shutil.copytree(serial, tmp_path / "copy")
    (serial / "origin.json").write_text((serial / "origin.json").read_text().replace("sha-of-the-data", "other-data"))
    assert "for data set other-data," in refusal(*SMALL)


@pytest.mark.parametrize("bits", ["3.9", "16", "nan"])
def test_a_mean_that_cannot_be_met_is_refused_before_anything_is_measured(run, tmp_path, capsys, bits):
    assert main(["quantize", str(run), str(tmp_path / "out"), "--mean-bits", bits]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "give a number from 4 to below 16" in line
    assert not list(tmp_path.iterdir())


def test_candidates_share_the_budget_between_the_groups():
    ladder = {4: 1.0, 8: 0.1, 16: 0.0}
    units = {f"c{n}": Unit(1000, ladder) for n in range(4)} | {f"q{n}": Unit(1000, ladder) for n in range(4)}
    groups = {name: "content" if name.startswith("c") else "quality" for name in units}
    found = candidates(units, groups, 8.0)
    assert len(found) > 3
    means = [mean_bits({name: unit for name, unit in units.items() if name[0] == "c"}, bits) for bits in found]
    assert min(means) < 8.0 < max(means)
    assert all(bits_of(units, bits) <= 8.0 * 8000 for bits in found)
    assert math.isclose(mean_bits(units, candidates(units, groups, 4.0)[0]), 4.0)
    assert len(candidates(units, dict.fromkeys(units, "content"), 8.0)) == 1
