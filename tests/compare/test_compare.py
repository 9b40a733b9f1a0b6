"""`ecar-dist compare` on run directories made without training."""

import json
import sys

import pytest

from ecar_dist.cli import main
from ecar_dist.compare.curves import read_curves
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.flops import FLOPS_PER_MAC
from ecar_dist.kinds.table import kind_of
from tests.runtime.made_runs import make_run


def made(folder, name, losses, *, step_seconds=36.0, dataset="a" * 64, **sections):
    """A run with 16 samples per step that logged every 100th step, and validated at every second logged step."""
    run, config = make_run(folder, run={"name": name}, **sections)
    lines = []
    for number, loss in enumerate(losses, 1):
        line = {"step": 100 * number, "samples_seen": 1600 * number, "train/loss": loss}
        line |= {} if number == 1 else {"perf/step_seconds": step_seconds}  # as after a start
        line |= {"eval/loss": loss + 0.1, "eval/loss_ema": loss + 0.05} if number % 2 == 0 else {}
        lines.append(json.dumps(line))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    attempt = {"attempt": "0123abcd", "started": "2026-01-01T00:00:00+00:00", "dataset_ids": [dataset], "world_size": 2}
    (run / "lineage.json").write_text(json.dumps([attempt]))
    return run, config


def compared(capsys, *runs):
    assert main(["compare", *map(str, runs), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_compared_at_equal_samples_flops_and_hours(tmp_path, capsys):
    first, config = made(tmp_path, "first", [1.0] * 4)
    second, _ = made(tmp_path, "second", [0.5] * 8, step_seconds=9.0)
    (first / "scores.json").write_text(json.dumps({"FD": 13.5, "samples_seen": 6400, "classifier": "x"}))
    tree = compared(capsys, first, second)

    # Both have seen 6,400 samples; the second one is four times as fast, so it has trained half as long.
    assert [run["samples"] for run in tree["runs"]] == [6400, 12800]
    assert [run["hours"] for run in tree["runs"]] == pytest.approx([4.0, 2.0])
    macs = kind_of(config).training_macs(config)
    assert tree["runs"][0]["flops"] == 6400 * FLOPS_PER_MAC * macs
    ends = {axis: places[-1] for axis, places in tree["equal"].items()}
    assert ends["samples"]["at"] == 6400
    assert ends["samples"]["loss"] == pytest.approx([1.0, 0.5])
    assert ends["samples"]["validation"] == pytest.approx([1.1, 0.6])
    assert ends["hours"]["at"] == pytest.approx(2.0)
    assert ends["hours"]["validation_ema"] == pytest.approx([1.05, 0.55])
    assert tree["runs"][0]["scores"] == {"FD": 13.5, "samples_seen": 6400}
    assert tree["notes"] == []

    # The same as text.
    assert main(["compare", str(first), str(second)]) == 0
    text = capsys.readouterr().out
    assert "6,400" in text
    assert "1.0500" in text
    assert "13.5" in text


def test_a_value_is_on_the_line_between_its_neighbours(tmp_path):
    run, _ = made(tmp_path, "run", [1.0, 1.0, 3.0, 3.0])
    curves = read_curves(run)
    assert curves.at("samples", "validation_ema", 3200) == pytest.approx(1.05)
    assert curves.at("samples", "validation_ema", 4800) == pytest.approx(2.05)
    assert curves.at("samples", "validation_ema", 1600) is None  # before the first one
    assert curves.at("samples", "loss", 6400) == pytest.approx(2.0)  # the mean of the last lines


def test_other_data_and_other_stages_are_noted(tmp_path, capsys):
    first, _ = made(tmp_path, "first", [1.0])
    second, _ = made(tmp_path, "second", [1.0], dataset="b" * 64, flow={"num_stages": 2})
    notes = " ".join(compared(capsys, first, second)["notes"])
    for fact in ("a" * 12, "b" * 12, "flow.num_stages: first 3, second 2"):
        assert fact in notes


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    run, _ = made(tmp_path, "run", [])
    assert main(["compare", str(run)]) == 1
    assert "log.every_steps=10" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_the_picture_needs_matplotlib(tmp_path, monkeypatch):
    from ecar_dist.compare.plot import plot_curves

    curves = [read_curves(made(tmp_path, name, [1.0, 0.9, 0.8])[0]) for name in ("one", "two")]
    plot_curves(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"ecar-dist\[plot\]"):
        plot_curves(curves, tmp_path / "none.png")
