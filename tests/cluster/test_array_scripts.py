"""The job scripts of arrays: each task gets its number, and the total number of tasks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_tools.image_folders import content
from tests.data_tools.images.test_index import write_tars

ROOT = Path(__file__).parents[2]
SCRIPTS = {"encode": "ecar-data", "index": "ecar-data", "sensitivity": "ecar-dist"}
WHOLE = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MAX": "3"}
ONE = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MAX": "3"}


def run(script, venv, words, **variables):
    environment = {"PATH": os.environ["PATH"], "VENV": str(venv), **variables}
    command = ["bash", f"slurm/{script}.sbatch", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def stand_ins(folder, text):
    """An environment whose programs are this shell script."""
    for name in ("ecar-dist", "ecar-data"):
        program = folder / "venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    return folder / "venv"


def test_all_scripts_of_arrays_are_here():
    """A script that reads the number of its task is for an array. train.sbatch may be in a chain of jobs."""
    scripts = {path.stem for path in (ROOT / "slurm").glob("*.sbatch") if "--tasks" in path.read_text()}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("variables", "expected"),
    [(WHOLE, "--task 3 --tasks 4"), ({**ONE, "TASKS": "8"}, "--task 3 --tasks 8"), (ONE, None)],
)
def test_a_script_passes_its_task_on(tmp_path, script, variables, expected):
    venv = stand_ins(tmp_path, 'echo "$(basename "$0") $@"')
    done = run(script, venv, ["a", "b", "--more", "8"], SLURM_ARRAY_TASK_ID="3", **variables)
    if expected is None:
        assert done.returncode == 1
        assert "give the total number: TASKS=" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{SCRIPTS[script]} {script} a b --more 8 {expected}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_array_or_words_nothing_starts(tmp_path, script):
    venv = stand_ins(tmp_path, "echo started")
    for done in (run(script, venv, ["a", "b"]), run(script, venv, ["a"], SLURM_ARRAY_TASK_ID="0", **WHOLE)):
        assert done.returncode != 0
        assert f"slurm/{script}.sbatch" in done.stderr or "no job array" in done.stderr
        assert "started" not in done.stdout


def test_an_array_indexes_a_folder_of_tars(tmp_path):
    """The script itself with the real command, as two tasks."""
    write_tars(tmp_path / "tars")
    venv = stand_ins(tmp_path, f'exec {sys.executable} -m data_tools "$@"')
    for task in ("1", "0"):
        assert not (tmp_path / "index").exists()
        variables = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_ID": task}
        done = run("index", venv, [tmp_path / "tars", tmp_path / "index"], PYTHONPATH=str(ROOT), **variables)
        assert done.returncode == 0, done.stderr
    assert set(content(tmp_path / "index")) == {"manifest.json", "000000.npy", "000001.npy", "000002.npy"}
