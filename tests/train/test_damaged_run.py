"""A run directory that was damaged between two attempts: its checkpoints are intact, so the run continues."""

import json
import os
import shutil

import pytest

from tests.conftest import read_metrics, write_yaml
from tests.fork_server import run_forked

LOGS = ("metrics.jsonl", "bad_steps.jsonl", "lineage.json", "jobs/001/job", "logs/watchdog/a/rank-00000.json")


@pytest.fixture(scope="module")
def trained(make_tree, tmp_path_factory):
    """A config, and the run directory after two steps of it."""
    folder = tmp_path_factory.mktemp("damaged")
    tree = make_tree(folder)
    tree["batch"]["micro_batch_size"] = 16
    tree["train"]["total_samples"] = 32
    config, run = write_yaml(tree, folder), folder / "runs/tiny"
    done = run_forked("train", str(config))
    assert done.returncode == 0, done.stderr
    (run / "bad_steps.jsonl").write_text('{"step": 1, "reason": "spike"}\n{"step": 2, "reason": "spike"}\n')
    for name in LOGS[3:]:
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("7\n")
    run.rename(folder / "whole")
    return config, run


def flip(path):
    content = bytearray(path.read_bytes())
    content[max(0, content.find(b'"'))] ^= 4
    path.write_bytes(content)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def huge(path):
    os.truncate(path, 40 << 30)


@pytest.mark.parametrize("damage", [flip, pipe, huge])
def test_damaged_logs_end_no_run_and_are_not_lost(trained, damage):
    """Each of these once ended the run with a traceback, permanently."""
    config, run = trained
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(run.parent.parent / "whole", run)
    before = json.loads((run / "lineage.json").read_text())
    for name in LOGS:
        damage(run / name)
    assert run_forked("status", str(run)).returncode == 0
    done = run_forked("train", str(config), "train.total_samples=48")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert {name for name in LOGS[:3] if any(f"{run}/{name} " in line for line in said)} == set(LOGS[:3])
    assert read_metrics(config)[-1]["step"] == 3
    attempts = json.loads((run / "lineage.json").read_text())
    assert (attempts[0], len(attempts)) == (before[0], 2)
    kept = {path.name for path in run.glob("*.damaged-1")}
    assert kept == {f"{name}.damaged-1" for name in (LOGS[2:3] if damage is flip else LOGS[:3])}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_lock_that_is_none_is_one_line(trained, make):
    config, run = trained
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(run.parent.parent / "whole", run)
    (run / ".lock").unlink()
    make(run / ".lock")
    done = run_forked("train", str(config), timeout=30)
    assert done.returncode == 1
    assert f"ecar-dist: {run}/.lock " in done.stderr
    assert "Traceback" not in done.stderr
