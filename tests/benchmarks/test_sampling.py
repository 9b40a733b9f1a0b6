"""The sampling benchmark at its smallest size: it runs, and what it reports follows from what it ran."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecar_dist.compress.calibration import Calibration
from ecar_dist.compress.model import Recipe, quantized_model
from ecar_dist.compress.report import memory_bytes
from ecar_dist.compress.write import tensor_entries
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.quantize.layers import quantizable, tied_units
from ecar_dist.runtime.export.write import write_weights

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--latent-size", "8", "--rounds", "2", "--batches", "2", "--dit-share", "0.04"]


@pytest.fixture
def benchmark(monkeypatch):
    """`name` -> the module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def calls_by_row(model, rows):
    original = model.velocity

    def counting(x, time, stage, *rest, **more):
        rows.append((stage, len(x)))
        return original(x, time, stage, *rest, **more)

    model.velocity = counting


def case(samplers, **changes):
    settings = {"preset": "T", "latent_size": 8, "mode": "eager", "guidance": 1.0, "dit_share": 1.0, "largest": False}
    batches = dict.fromkeys(samplers.of_kinds(["dit"]), 2)
    return samplers.Case(**{**settings, "batches": batches, "device": torch.device("cpu"), **changes})


def test_it_ends_with_json_a_table_a_plot_and_the_targets(benchmark, tmp_path, capsys):
    main = benchmark("sampling").main
    main([*SMALL, "--save", str(tmp_path / "a/b.json"), "--plot", str(tmp_path / "p.png"), "--hardware", "this"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "a/b.json").read_text()) == result
    assert Image.open(tmp_path / "p.png").size[0] > 300
    assert (result["hardware"], result["device"], result["dtype"]) == ("this", "cpu", "fp32")
    assert [(found["guidance"], found["batches"]["ECAR"]) for found in result["cases"]] == [(1.0, 2), (2.0, 2)]
    for found in result["cases"]:
        assert found["rounds"] == 2
        assert found["calls"] == {"ECAR": 48, "dit, 250 steps": 250, "dit, 50 steps": 50}
        assert found["steps_run"] == {"ECAR": 8, "dit, 250 steps": 10, "dit, 50 steps": 2}
        assert sum(found["share_of_ecars_time"].values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in found["share_of_ecars_time"].values())
        assert found["faster"]["dit, 250 steps"]["calls_predict"] == 250 / 48
    assert out.count("from 10 of 250 steps") == 2
    assert out.count("found   speed over dit, 250 steps") == 2
    assert "target of XL on an H200 >= 10" in out


def test_all_kinds_in_one_table(benchmark, capsys):
    samplers = benchmark("samplers")
    assert {contender.kind for contender in samplers.CONTENDERS.values()} == set(KINDS)
    small = ["--latent-size", "8", "--rounds", "1", "--batches", "1", "--guidance", "2", "--dit-share", "0.04"]
    benchmark("sampling").main([*small, "--kinds", *KINDS])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])["cases"][-1]
    assert list(last["calls"]) == list(samplers.CONTENDERS)

    # 16 tokens: 16 steps of MAR and of single codes; 4 + 12 / 4 groups of four; each head is integrated in 16 calls.
    calls = {"pyramid": 48, "mar": 16 * 17, "par, n = 1": 16, "par, n = 4": 7, "par_cont, n = 4": 7 * 17, "hybrid": 28}
    assert {name: last["calls"][name] for name in calls} == calls
    assert last["faster"]["par, n = 4"]["calls_predict"] == 7 / 48
    assert last["parameters"]["par, n = 1"] == last["parameters"]["par, n = 4"] - 3 * 128  # three markers
    rows = out.partition("all contenders")[2].splitlines()
    assert rows[1].split("  ")[-1] == "at batch"
    assert [row.rsplit(maxsplit=6)[0] for row in rows[2 : 2 + len(last["calls"])]] == list(samplers.CONTENDERS)


def test_sizes_are_those_of_the_quantised_files(benchmark, tmp_path, monkeypatch, capsys):
    samplers = benchmark("samplers")
    monkeypatch.setattr(samplers, "generate", None)  # nothing is drawn
    benchmark("sampling").main(["--sizes", "--latent-size", "8", "--kinds", "hybrid"])
    sizes = json.loads(capsys.readouterr().out.splitlines()[-1])["sizes"]
    assert list(sizes) == ["ECAR", "hybrid"]
    for name, bits in (("ECAR", 8), ("hybrid", 4)):
        config = samplers.config_of(samplers.CONTENDERS[name], case(samplers))
        model = kind_of(config).build_model(config)
        fp32 = sum(value.numel() for value in model.parameters()) * 4
        seen = {f"{layer}|stage0|all": torch.ones(linear.in_features) for layer, linear in quantizable(model).items()}
        units = dict.fromkeys(tied_units(quantizable(model)), bits)
        rounded = quantized_model(model, units, Calibration(seen), Recipe())
        (file,) = write_weights(tmp_path, tensor_entries(rounded, torch.float32), 2**30)
        assert sizes[name]["memory MiB"]["fp32"] == fp32 / 2**20
        assert sizes[name]["memory MiB"][f"W{bits}A8"] == memory_bytes(rounded) / 2**20
        assert sizes[name]["file MiB"][f"W{bits}A8"] == file["bytes"] / 2**20


def test_at_full_size_the_prediction_is_that_of_the_claim(benchmark):
    """11.6 times the MACs of docs/ecar.md, whose DiT learns a variance, and 5.2 times the calls; both sides guided."""
    samplers = benchmark("samplers")
    macs = {}
    for name in samplers.of_kinds(["dit"]):
        config = samplers.config_of(
            samplers.CONTENDERS[name], case(samplers, preset="XL", latent_size=32, guidance=1.0)
        )
        assert (config.model.preset, config.stage_tokens[-1]) == ("XL", 256)
        macs[name] = samplers.kind_of(config).sampling_macs(config)
    assert macs["dit, 250 steps"] / macs["ECAR"] == pytest.approx(11.6, rel=0.01)


@pytest.mark.parametrize(("guidance", "expected"), [(1.0, {0: 32, 1: 32, 2: 32}), (2.0, {0: 32, 1: 64, 2: 64})])
def test_a_turn_runs_what_it_says(benchmark, guidance, expected):
    samplers = benchmark("samplers")
    turns = samplers._turns(case(samplers, guidance=guidance, dit_share=0.1))
    assert turns["dit, 250 steps"].model is turns["dit, 50 steps"].model
    trunks = [turns[name].model.flow.transformer for name in ("ECAR", "dit, 250 steps")]
    assert len({sum(p.numel() for p in trunk.parameters()) for trunk in trunks}) == 1
    rows = []
    calls_by_row(turns["ECAR"].model, rows)
    assert turns["ECAR"].run(turns["ECAR"].steps_run) > 0
    assert {stage: sum(n for k, n in rows if k == stage) for stage in range(3)} == expected  # 2 images x 16 calls
    assert len(rows) == 48
    rows = []
    calls_by_row(turns["dit, 250 steps"].model, rows)
    turns["dit, 250 steps"].run(turns["dit, 250 steps"].steps_run)
    assert rows == [(0, 2 if guidance == 1.0 else 4)] * 25


def test_times_are_those_of_all_steps_and_ratios_those_of_a_round(benchmark, monkeypatch):
    samplers, sampling = benchmark("samplers"), benchmark("sampling")
    speed = iter([1.0, 1.0, 1.0, *[1.0] * 3, *[3.0] * 3, *[2.0] * 3])  # warm-up, then rounds that something slows down

    def run(turn, steps, model=None):
        each = 0.05 if turn.contender.kind == "ecar" else 0.01
        return each * steps * next(speed)

    monkeypatch.setattr(samplers.Turn, "run", run)
    monkeypatch.setattr(samplers.Turn, "shares", lambda turn: {})
    measured = samplers.measure(case(samplers, dit_share=0.1), 3)
    assert measured.seconds["ECAR"] == pytest.approx([0.4, 1.2, 0.8])
    assert measured.seconds["dit, 250 steps"] == pytest.approx([2.5, 7.5, 5.0])
    measured.seconds.update({"ECAR": [3.0, 1.0, 2.0], "dit, 250 steps": [6.0, 4.0, 12.0]})
    summary = sampling._summary(measured, torch.device("cpu"))
    assert summary["faster"]["dit, 250 steps"]["measured"] == pytest.approx(4.0)  # of 2, 4, 6; medians make 3
    assert summary["images_per_second"]["ECAR"] == pytest.approx(2 / 2.0)


def test_the_largest_batch_is_found_by_doubling(benchmark):
    doubled_while = benchmark("samplers").doubled_while
    assert doubled_while(lambda batch: batch <= 100, None) == 64
    assert doubled_while(lambda batch: batch <= 100, 32) == 32
    assert doubled_while(lambda batch: False, None) == 1


def test_where_memory_ends_each_contender_has_its_own_batch_and_a_case_that_does_not_fit_is_halved(
    benchmark, monkeypatch
):
    samplers = benchmark("samplers")

    def run(turn, steps, model=None):
        if len(turn._indices) > (20 if turn.contender.kind == "ecar" else 40):
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(samplers.Turn, "run", run)
    monkeypatch.setattr(samplers.Turn, "shares", lambda turn: {})
    found = samplers.largest_batches(case(samplers), None)
    assert found.batches == {"ECAR": 16, "dit, 250 steps": 32, "dit, 50 steps": 32}
    assert found.largest
    assert not samplers.largest_batches(case(samplers), 8).largest  # the bound ended it, not memory
    too_large = case(samplers, batches=dict.fromkeys(samplers.of_kinds(["dit"]), 64))
    assert set(samplers.measure(too_large, 1).case.batches.values()) == {16}


def test_targets_are_met_or_missed_on_a_gpu_alone(benchmark, capsys):
    sampling = benchmark("sampling")

    def found(batch, ratio):
        batches = dict.fromkeys(sampling.of_kinds(["dit"]), batch)
        faster = {"dit, 250 steps": {"measured": ratio}}
        return {
            "batches": batches, "faster": faster, "guidance": 2.0, "mode": "compiled", "largest_that_fits": batch > 1
        }  # fmt: skip

    sampling._report_targets([found(1, 5.1), found(64, 9.9)], torch.device("cuda"))
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first == "met     speed over dit, 250 steps, batch 1, guidance 2, compiled: 5.10; target >= 5"
    assert second.startswith("MISSED  speed over dit, 250 steps, batch 64, the largest that fits, guidance 2")
    sampling._report_targets([found(1, 99.0)], torch.device("cpu"))
    assert capsys.readouterr().out.strip().startswith("found ")
