"""Drills from the outside: one real drill, and drills that fail."""

import dataclasses
import json
import os
import signal
import socket
import threading
import time

import pytest

from ecar_dist.drills import ground as ground_module
from ecar_dist.drills import processes
from ecar_dist.drills.evidence import Finding
from ecar_dist.drills.ground import CannotRunError, Ground, Quiet, Trial
from ecar_dist.drills.processes import Job, UnexpectedError
from ecar_dist.drills.rank_faults import as_quiet
from ecar_dist.drills.run import DRILLS, Drill, run_drills
from ecar_dist.errors import ConfigError, TrainingError
from tests.conftest import write_yaml
from tests.drills import forked

QUIET = Quiet({}, seconds=1.0, startup_seconds=1.0, step_seconds=0.1, checkpoint_bytes=1)
NAMES = {
    *("kill-rank", "hang-rank", "slow-rank", "nan", "torn-checkpoint"),
    *("corrupt-shard", "s3-503", "disk-full", "preempt", "resize"),
}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """What a failed drill keeps for the user is removed with the test's own folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def killed(make_tree, tmp_path_factory):
    """A real kill-rank drill on two ranks; torchrun starts those that are struck. Returns config, status, folder,
    result."""

    def start(command, environment, log, patience):
        kind = Job if log.name == "kill-rank-1.txt" else forked.ForkedJob
        kinds.append(kind)
        return kind(command, environment, log, patience)

    folder, kinds = tmp_path_factory.mktemp("drill"), []
    tree = make_tree(folder)
    tree["batch"]["micro_batch_size"] = 8  # one per rank and step
    config = write_yaml(tree, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_module, "Job", start)
        patch.setattr(processes, "marked", forked.marked)
        status = run_drills(["kill-rank"], config, keep=folder / "kept", json_file=folder / "result.json")
    assert kinds == [forked.ForkedJob, Job, forked.ForkedJob]
    return config, status, folder / "kept", json.loads((folder / "result.json").read_text())


def test_a_killed_rank_is_survived_as_expected(killed):
    _, status, folder, result = killed
    (row,) = result["drills"]
    assert row["outcome"] == "as expected", [finding for finding in row["findings"] if not finding["ok"]]
    assert (status, result["passed"]) == (0, True)
    assert len(row["findings"]) == 8
    attempts = json.loads((folder / "runs/kill-rank/lineage.json").read_text())
    begun, resumed = (attempt["resumed_from_step"] for attempt in attempts)
    assert begun is None
    assert resumed in (10, 20), "20 if the machine was slow to strike"


def test_a_run_that_is_not_the_quiet_one_is_found_out(killed, monkeypatch, tmp_path, capsys):
    """The real run's metrics, against a quiet run in which one loss differs."""
    config, _, folder, _ = killed

    def compare(ground):
        losses = {entry["step"]: entry["train/loss"] for entry in Trial(ground, "quiet").metrics()}
        trial = Trial(ground, "kill-rank")
        ground.quiet = dataclasses.replace(QUIET, losses=losses)
        assert all(finding.ok for finding in as_quiet(ground, trial))
        ground.quiet = dataclasses.replace(QUIET, losses={**losses, 17: losses[17] * 1.00001})
        yield from as_quiet(ground, trial)

    offer(monkeypatch, compare)
    monkeypatch.setattr(Ground, "prepare", lambda ground: os.symlink(folder / "runs", ground.folder / "runs"))
    assert run_drills(["nan"], config, keep=tmp_path / "kept") == 1
    out = capsys.readouterr().out
    assert "!! largest difference 1.0e-05 at step 17" in " ".join(out.split())
    assert "1 NOT AS EXPECTED" in out


def offer(monkeypatch, drill):
    """Replace `nan` with this drill, without a quiet run."""
    monkeypatch.setitem(DRILLS, "nan", Drill("a fault", drill))
    monkeypatch.setattr(Ground, "prepare", lambda ground: None)


def test_the_names_are_those_promised_and_others_are_refused(write_config):
    assert set(DRILLS) == NAMES
    for names, skip in ((["kill-rnk"], []), (["all"], ["kill-rnk"])):
        with pytest.raises(ConfigError, match="there is no drill 'kill-rnk'; did you mean kill-rank"):
            run_drills(names, write_config(), skip=skip)


def test_what_cannot_run_or_is_skipped_is_told_apart(write_config, monkeypatch, capsys):
    def impossible(ground):
        raise CannotRunError("there is no server here")
        yield

    offer(monkeypatch, impossible)
    assert run_drills(["nan"], write_config()) == 1
    assert "there is no server here" in capsys.readouterr().out
    assert run_drills(["nan"], write_config(), skip=["nan"]) == 0
    assert "1 skipped" in capsys.readouterr().out


def test_a_surprise_keeps_what_was_found_before_it(write_config, monkeypatch, capsys):
    def surprised(ground):
        yield Finding("first", f"{ground.folder}/runs/nan is on host {socket.gethostname()}", True)
        raise UnexpectedError("the job ended before step 15")

    offer(monkeypatch, surprised)
    assert run_drills(["nan"], write_config()) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert " runs/nan is on host HOST" in out
    assert "!! the job ended before step 15" in out


def test_a_folder_to_keep_must_be_new(write_config, tmp_path):
    with pytest.raises(ConfigError, match="is not empty; give --keep a new folder"):
        run_drills(["nan"], write_config(), keep=tmp_path)


def test_a_quiet_run_that_fails_is_the_users_to_fix(write_config, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(ground_module, "Job", forked.ForkedJob)
    tree["data"]["num_classes"] = 9
    with pytest.raises(TrainingError, match=r"quiet run .*: ecar-dist: data\.num_classes=9.*; fix that first \(log: "):
        run_drills(["nan"], write_config(), keep=tmp_path / "kept", ranks=1)


def test_a_signal_ends_the_drills_as_ctrl_c_does(write_config, monkeypatch, tmp_path):
    def patient(ground):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(20)
        yield

    offer(monkeypatch, patient)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_drills(["nan"], write_config())
    assert not list(tmp_path.glob("ecar-drill-*"))
    assert signal.getsignal(signal.SIGTERM) is before
