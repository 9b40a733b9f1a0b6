"""`ecar-dist quantize` as a user sees it: the files, the loaders, the numbers, the mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ecar_dist.api import load
from ecar_dist.cli import main
from ecar_dist.errors import CheckpointError
from ecar_dist.kinds.table import KINDS
from ecar_dist.quantize.linear import QuantizedLinear
from ecar_dist.runtime.export.files import ExportReader, read_facts
from ecar_dist.runtime.initial.source import open_initial_weights
from ecar_dist.sample.load import open_trained
from tests.quantize.test_linear import Products
from tests.sample.made_models import make_model_run

CPU = torch.device("cpu")


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]


def drawn(model, out):
    assert main(["sample", str(model), "--labels", "1,2", "--count", "2", "--out", str(out)]) == 0
    return pixels(out)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_export_of_integers(quantized, bits):
    folder = quantized("--weights", str(bits))
    tensors = load_file(folder / "model.safetensors")
    facts = read_facts(folder)
    assert len(facts.quantization.layers) == 9
    stored = {torch.uint8: 4, torch.int8: 8}
    for name, layer in facts.quantization.layers.items():
        assert stored[tensors[f"{name}.weight"].dtype] == layer.weights == bits
    # Embedders, adaLN and output are unchanged.
    kept = {name for name, value in tensors.items() if value.dtype == torch.float32 and name.endswith(".weight")}
    assert {"flow.output.weight", "flow.state_projection.weight", "flow.time_embedding.mlp.0.weight"} <= kept
    assert any("modulation" in name for name in kept)


def test_the_report_says_what_it_costs_and_what_it_changes(run, quantized, capsys):
    eight = json.loads((quantized("--weights", "8") / "quantization.json").read_text())
    four = json.loads((quantized("--weights", "4") / "quantization.json").read_text())
    for report in (eight, four):
        assert report["before"]["memory MiB"] > report["after"]["memory MiB"] > 0
        assert report["before"]["file MiB"] > report["after"]["file MiB"] > 0
        assert report["after"]["ms a batch"] > 0
        assert report["paired"]["SSIM"] > 0.5
    assert four["after"]["file MiB"] < eight["after"]["file MiB"]
    assert eight["paired"]["SQNR of the velocity, dB"] > 25
    assert eight["paired"]["SQNR of the velocity, dB"] > four["paired"]["SQNR of the velocity, dB"] + 8
    card = (quantized("--weights", "4") / "README.md").read_text()
    assert "layers with 4 bits" in card
    assert "`quantization.json` compares" in card


def test_it_says_that_four_bits_are_not_accelerated(run, tmp_path, capsys):
    words = ["quantize", str(run), str(tmp_path / "out"), "--images", "2", "--weights", "4"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "not accelerated" in printed
    assert "no token is an outlier" in printed
    assert "stage2 velocity" in printed


def test_sample_and_load_take_it(quantized, run, tmp_path):
    folder = quantized("--weights", "8")
    ours, theirs = drawn(folder, tmp_path / "ours"), drawn(run, tmp_path / "theirs")
    assert all(np.abs(a.astype(int) - b).mean() < 6 for a, b in zip(ours, theirs, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    again = load(folder).sample([1, 2])
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("words", [["export"], ["list"], ["verify"], ["inspect"], ["diff", "RUN"]])
def test_it_is_no_run_for_the_commands_of_checkpoints(quantized, run, words, capsys):
    verb, *others = words
    given = [str(run) for _ in others] + [str(quantized("--weights", "8"))]
    assert main(["checkpoint", verb, *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "give the run that it was made from" in line


def test_it_is_scored_as_its_run_is(quantized, digits, tmp_path, quick_classifier):
    folder = shutil.copytree(quantized("--weights", "8"), tmp_path / "eight")
    images = [f"--{part}-images={digits / 'images' / part}" for part in ("train", "heldout")]
    assert main(["evaluate", str(folder), *images, "--count", "8", "--sampling-seeds", "1"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["model"], scores["weights"], scores["samples"]) == (str(folder), "ema", 8)
    assert scores["FD-digits"] > scores["FD-digits reconstructions"] > 0


def test_an_export_is_quantised_as_its_run_is(run, quantized, tmp_path):
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "export")]) == 0
    words = ["--images", "2", "--batch-size", "2", "--weights", "8"]
    assert main(["quantize", str(tmp_path / "export"), str(tmp_path / "ours"), *words]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", quantized(*words[-2:])))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["mar", "par", "par_cont", "hybrid"])
def test_every_kind_is_quantised_and_drawn(kind, tmp_path):
    more = {"codebook_size": 16} if KINDS[kind].needs_codebook else {}
    sections = {"model": {"kind": kind, "preset": "T", "patch_size": 1, "ar_depth": 1, "flow_depth": 1, **more}}
    sample = {"solver": "euler", "steps_per_stage": 2, "ar_steps": 4, "code_steps": 2}
    run = make_model_run(tmp_path, flow={"num_stages": 1}, par={"group": 4}, sample=sample, **sections)
    words = [str(run), str(tmp_path / "out"), "--images", "2", "--batch-size", "2"]
    assert main(["quantize", *words]) == 0
    assert read_facts(tmp_path / "out").quantization.layers
    folder = tmp_path / "sensitivity"
    words = ["sensitivity", str(run), str(folder), "--images", "2", "--batch-size", "2", "--tasks", "9"]
    assert main(words) == 0
    groups = {json.loads(path.read_text())["group"] for path in folder.glob("*-w*.json")}
    assert groups <= {"content", "quality"}
    assert drawn(tmp_path / "out", tmp_path / "drawn")


def test_no_product_of_the_sampler_has_too_few_rows(quantized, monkeypatch):
    monkeypatch.setattr("ecar_dist.quantize.integer_product.CPU_HAS_INT8", True)
    trained = open_trained(quantized("--weights", "8"), CPU)
    assert any(isinstance(module, QuantizedLinear) for module in trained.model.modules())
    with Products() as products:
        list(trained.draw([3], 0, 1))
    assert len(products.sizes) >= 36
    assert min(rows for rows, _, _ in products.sizes) == 17  # stage 0 of one image has one token
    assert not [size for size in products.sizes if size[1] % 8 or size[2] % 8]


def test_the_rest_may_be_bf16(quantized):
    tensors = load_file(quantized("--weights", "8", "--dtype", "bf16") / "model.safetensors")
    assert tensors["flow.output.weight"].dtype == torch.bfloat16
    assert tensors["flow.transformer.blocks.0.mlp.0.bias"].dtype == torch.float32
    ExportReader(quantized("--weights", "8", "--dtype", "bf16"))


def test_an_older_reader_refuses_it_in_one_line(quantized, run, tmp_path, monkeypatch, capsys):
    # The older version knows only one schema, and keeps its message.
    assert json.loads((quantized("--weights", "8") / "config.json").read_text())["schema"] == "ecar-export-v2"
    monkeypatch.setattr("ecar_dist.runtime.export.files.QUANTIZED_SCHEMA", "unknown")
    assert main(["sample", str(quantized("--weights", "8")), "--out", str(tmp_path / "drawn")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ecar-export-v2" in line
    assert "use the version that wrote it" in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "ecar-export-v1"}, "does not match"),
        ({"quantization": None}, "does not match"),
        ({"quantization": {"layers": {}}}, "layers"),
        ({"quantization": {"layers": {"flow.output": {"weights": 8, "rotated": True}}}}, "is not F32"),
        ({"quantization": {"layers": {"nothing": {"weights": 3, "rotated": True}}}}, "weights"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(quantized, tmp_path, change, named):
    folder = tmp_path / "changed"
    shutil.copytree(quantized("--weights", "8"), folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | change))
    with pytest.raises(CheckpointError, match=named):
        open_trained(folder, CPU)


def test_it_is_neither_quantised_again_nor_fine_tuned(quantized, tmp_path, capsys):
    folder = quantized("--weights", "8")
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 1
    assert "is quantised already" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="quantised export"):
        open_initial_weights(folder)


def test_a_calibration_of_another_model_is_refused(run, tmp_path, capsys):
    file = tmp_path / "calibration.safetensors"
    words = [str(run), str(tmp_path / "one"), "--images", "2", "--calibration", str(file)]
    assert main(["quantize", *words]) == 0
    assert file.exists()

    def refusal(*options):
        assert main(["quantize", str(run), str(tmp_path / "two"), "--calibration", str(file), *options]) == 1
        assert not (tmp_path / "two").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    capsys.readouterr()
    assert "for weights " in refusal("--ema", "ema1")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"sha-of-the-data", b"sha-of-the-DATA"))
    assert "for data set sha-of-the-DATA," in refusal()
    file.write_bytes(b"nothing")
    assert "is not a safetensors file" in refusal()
    file.write_bytes(content)
    assert main(["quantize", str(run), str(tmp_path / "two"), "--images", "2", "--calibration", str(file)]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--alpha", "2"], "--alpha 2 is outside"), (["--seed", "-1"], "--seed -1"), (["--step", "7"], "7")],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, options, named):
    assert main(["quantize", str(run), str(tmp_path / "out"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_folder_that_exists_is_left_alone(run, tmp_path, capsys):
    assert main(["quantize", str(run), str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
