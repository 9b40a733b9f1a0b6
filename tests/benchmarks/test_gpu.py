"""gpu.sh as a dry run on CPU at the smallest sizes: its sections, their limits, and packages from wheels."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """`name` -> the module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def gpu_sh(tmp_path, *options, **environment):
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--preset", "T", *options]
    settings = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path), **environment}
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


def saved(tmp_path):
    (path,) = (tmp_path / "out").glob("gpu-*.json")
    return json.loads(path.read_text())


def test_a_section_runs_and_what_it_found_is_a_table_and_a_file(tmp_path):
    done = gpu_sh(tmp_path, "--sections", "training")
    assert done.returncode == 0, done.stderr
    result = saved(tmp_path)
    assert (result["device"], result["preset"]) == ("cpu", "T")
    assert list(result["sections"]) == ["training"]
    assert "failed" not in result["sections"]["training"]
    first, second, *_ = result["sections"]["training"]["rows"]
    assert first["steps"] > 0
    assert first["samples_per_second"] == pytest.approx(2 / first["step_seconds"])
    assert second["planned_gib"] > first["planned_gib"]
    assert first["found"] in done.stdout
    assert "FAILED" not in done.stdout
    assert not list(tmp_path.glob("ecar-gpu-*"))  # only the result remains


def test_the_machine_is_described_with_its_rates(benchmark, tmp_path):
    run = benchmark("gpu_run")
    on_cpu = run.Run(torch.device("cpu"), "T", tmp_path, run.SIZES["cpu"])
    versions, machine, product, copy = benchmark("gpu_sections").about(on_cpu)
    assert f"torch {torch.__version__}" in versions["found"]
    assert f"{os.cpu_count()} cores" in machine["found"]
    assert product["flops"] > 0
    assert copy["bytes_per_second"] > 0


class PatientPopen(subprocess.Popen):
    """Starts its time limit when the process has written its row: on a busy machine, Python takes seconds to start."""

    def wait(self, timeout=None):
        if timeout is not None:
            rows = Path(self.args[self.args.index("--rows") + 1])
            while self.poll() is None and not (rows.exists() and rows.read_text().endswith("\n")):
                time.sleep(0.01)
        return super().wait(timeout)


def test_a_section_that_fails_or_is_out_of_time_is_a_line_and_the_others_run(benchmark, tmp_path, monkeypatch, capsys):
    gpu = benchmark("gpu")
    script = tmp_path / "sections.py"
    script.write_text(
        "import json, sys, time\n"
        "section, rows = sys.argv[1], sys.argv[sys.argv.index('--rows') + 1]\n"
        "with open(rows, 'a') as file: file.write(json.dumps({'what': 'a', 'found': 'first of ' + section}) + '\\n')\n"
        "if section == 'tests': sys.exit('no such device')\n"
        "if section == 'training': time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu, "LIMITS", {**dict.fromkeys(gpu.LIMITS, 300), "training": 1})
    monkeypatch.setattr(gpu.subprocess, "Popen", PatientPopen)
    common = ["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path)]
    gpu.main([*common, "--sections", "about", "tests", "training", "step"])
    lines = capsys.readouterr().out.splitlines()
    for expected in ("first of about", "FAILED no such device", "FAILED ended after 1 s", "first of step"):
        assert any(expected in " ".join(line.split()) for line in lines), expected
    assert saved(tmp_path)["sections"]["training"]["rows"] == [{"what": "a", "found": "first of training"}]

    # A second call adds to the file of the day; with no time left, its sections do not start.
    gpu.main([*common, "--seconds", "0", "--sections", "step"])
    assert "not run" in saved(tmp_path)["sections"]["step"]["failed"]
    assert saved(tmp_path)["sections"]["about"]["rows"][0]["found"] == "first of about"


def test_packages_that_are_lacking_come_from_wheels(benchmark, tmp_path, monkeypatch, capsys):
    packages = benchmark("gpu_packages")
    monkeypatch.setattr(packages, "MODULES", ("json", "no_such_module", "another_absent"))
    for name in ("No_Such-1.0-py3-none-any.whl", "pytest-9.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("no_such_module/__init__.py", "")
    with pytest.raises(SystemExit, match="another_absent") as error:
        packages.main([str(tmp_path)])
    assert "no_such_module" not in str(error.value)

    # pytest is installed, and is not replaced.
    monkeypatch.setattr(packages, "MODULES", ("json", "no_such_module"))
    packages.main([str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / "No_Such-1.0-py3-none-any.whl")]
    monkeypatch.setattr(packages, "MODULES", ("json",))
    packages.main([str(tmp_path / "absent")])
    assert capsys.readouterr().out == ""
