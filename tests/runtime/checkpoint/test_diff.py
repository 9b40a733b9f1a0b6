"""Two checkpoints compared, and one described."""

import json
import math

import pytest
import torch

import ecar_dist.runtime.checkpoint.inspect as report
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.checkpoint.files import MANIFEST
from ecar_dist.runtime.checkpoint.inspect import diff_checkpoints, find_checkpoint, inspect_lines
from tests.runtime.made_runs import commit, make_checkpoint, make_run

SHAPES = {"ar.head.weight": (4, 6), "flow.blocks.0.bias": (10,), "flow.blocks.1.bias": (3,)}


def state(seed=0, kinds=("ema", "exp_avg", "master")):
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in kinds}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(report, "BLOCK", 7)  # every parameter but one is read in pieces


def rows(lines, head):
    """The cells of a table, by the first cell of each row."""
    start = next(place for place, line in enumerate(lines) if line.startswith(head))
    return {line.split()[0]: line.split()[1:] for line in lines[start:]}


def test_equal_values_are_equal_whoever_wrote_them(tmp_path):
    a = make_checkpoint(tmp_path / "a", 4, state(), ranks=1)
    b = make_checkpoint(tmp_path / "b", 8, state(), ranks=3)
    diff = diff_checkpoints(a, b)
    assert diff.equal
    assert diff.lines == [
        f"A {a}: step 4, 64 samples, written by 1 rank with ZeRO-2",
        f"B {b}: step 8, 128 samples, written by 3 ranks with ZeRO-2",
        "equal: 3 tensors of ema, exp_avg, master, every value",
    ]


def test_a_difference_is_measured_by_module_and_the_largest_are_named(tmp_path):
    ours, theirs = state(), state()
    theirs["master"]["flow.blocks.1.bias"] *= 1.5
    theirs["exp_avg"]["ar.head.weight"][3, 5] += 200.0
    diff = diff_checkpoints(make_checkpoint(tmp_path / "a", 4, ours), make_checkpoint(tmp_path / "b", 4, theirs))
    assert not diff.equal
    table = rows(diff.lines, "module")
    norm = ours["exp_avg"]["ar.head.weight"].norm().item()
    assert float(table["ar.head"][1]) == pytest.approx(200 / norm, rel=0.01)
    assert table["ar.head"][::2] == ["0", "0"]
    assert table["flow.blocks"][:2] == ["0", "0"]
    whole = torch.cat([ours["master"][f"flow.blocks.{i}.bias"] for i in (0, 1)]).norm().item()
    part = 0.5 * ours["master"]["flow.blocks.1.bias"].norm().item()
    assert float(table["flow.blocks"][2]) == pytest.approx(part / whole, rel=0.01)
    largest = diff.lines[diff.lines.index("the 2 largest of 2 tensors that differ") + 2 :]
    assert largest[0].split() == ["ar.head.weight", "exp_avg", f"{200 / norm:.3g}", "200"]
    assert largest[1].split()[:3] == ["flow.blocks.1.bias", "master", "0.5"]


def test_kinds_parameters_shapes_and_identities_that_differ_are_listed(tmp_path):
    ours, theirs = state(kinds=("ema", "ema1")), state(kinds=("ema", "master"))
    for tensors in theirs.values():
        tensors["flow.new"] = torch.zeros(2)
        del tensors["ar.head.weight"]
        tensors["flow.blocks.1.bias"] = torch.zeros(4)
    a = make_checkpoint(tmp_path / "a", 4, ours, identity={"model": {"flow.gamma": -0.2}, "data": {"run.seed": 0}})
    b = make_checkpoint(tmp_path / "b", 4, theirs, identity={"model": {"flow.gamma": -0.3}, "data": {"run.seed": 0}})
    lines = diff_checkpoints(a, b).lines
    assert lines[2] == "identity flow.gamma: -0.2 -> -0.3"
    assert set(lines[3:8]) == {
        "only in A: ema1",
        "only in B: master",
        "only in A: parameter ar.head.weight",
        "only in B: parameter flow.new",
        "parameter flow.blocks.1.bias: [3] -> [4]",
    }


@pytest.mark.parametrize(("value", "equal"), [(math.nan, True), (math.inf, True), (0.0, False)])
def test_the_same_nan_is_equal_and_a_new_one_comes_first(tmp_path, value, equal):
    ours, theirs = state(), state()
    ours["master"]["ar.head.weight"][0, 0] = value
    theirs["master"]["ar.head.weight"][0, 0] = value if equal else math.nan
    theirs["ema"]["flow.blocks.0.bias"] *= 1.0 if equal else 100.0
    diff = diff_checkpoints(make_checkpoint(tmp_path / "a", 4, ours), make_checkpoint(tmp_path / "b", 4, theirs))
    assert diff.equal is equal
    if not equal:
        assert diff.lines[-2].split() == ["ar.head.weight", "master", "nan", "nan"]


def test_inspect_counts_and_measures(tmp_path):
    numbers = state()
    numbers["master"]["ar.head.weight"][0, 0] = math.nan
    path = make_checkpoint(tmp_path, 4, numbers)
    lines = inspect_lines(path)
    assert lines[0].startswith(f"{path}: step 4, 64 samples, written by 2 ranks with ZeRO-2; 2 files, 0.0 MiB")
    assert lines[1] == "37 parameters in 3 tensors"
    table = rows(lines, "kind")
    values = torch.cat([tensor.flatten() for tensor in numbers["ema"].values()])
    assert table["ema"] == ["37", "0.0", f"{values.norm().item():.4g}", f"{values.abs().max().item():.4g}", "0"]
    assert table["master"][-1] == "1"
    assert "nan" not in " ".join(table["master"])
    assert "  run.seed: 0" in lines


def test_a_checkpoint_is_found_by_itself_by_its_run_and_by_its_step(tmp_path):
    run, _ = make_run(tmp_path)
    paths = {step: make_checkpoint(run / "checkpoints", step, state()) for step in (4, 8)}
    assert find_checkpoint(run) == paths[8]
    assert find_checkpoint(run, 4) == paths[4]
    assert find_checkpoint(paths[4]) == paths[4]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; available steps: \[4, 8\]"):
        find_checkpoint(run, 5)
    with pytest.raises(ConfigError, match="contains no config"):
        find_checkpoint(tmp_path)
    with (paths[4] / "state-00000-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    for place in ((run, 4), (paths[4], None)):
        with pytest.raises(CheckpointError, match=r"xxh3_128 [0-9a-f]{32}\b.* [0-9a-f]{32}\b"):
            find_checkpoint(*place)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path):
    path = make_checkpoint(tmp_path / "a", 4, state())
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../b"
    commit(path, manifest)
    with pytest.raises(CheckpointError, match="not a plain file name"):
        inspect_lines(path)
