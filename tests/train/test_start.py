"""What a start refuses, and what it puts on record."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecar_dist.config_file import load_config
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint_files import read_manifest
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StoppedEarlyError
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.start import end_attempt, open_attempt, unreachable_half_lives
from tests.conftest import read_metrics

ALONE = World(Placement(), torch.device("cpu"))


def opened(path, *overrides):
    """A new attempt at the run of a config, by a process that has died since."""
    config = load_config(path, overrides)
    directory = RunDirectory(config.run_directory)
    open_attempt(directory, config, ALONE)
    directory._lock.close()
    return directory


def test_a_run_that_has_trained_does_not_begin_anew_because_its_checkpoints_were_looked_for_elsewhere(
    write_config, tmp_path
):
    config = write_config()
    directory = opened(config)
    opened(config, f"checkpoint.dir={tmp_path}/elsewhere")  # nothing was learnt yet
    opened(config)
    directory.metrics.write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"elsewhere/tiny holds no checkpoint, and the last attempt kept its own"):
        opened(config, f"checkpoint.dir={tmp_path}/elsewhere")
    opened(config)
    assert len(directory.attempts()) == 4


def test_a_relative_folder_of_checkpoints_is_another_one_elsewhere(write_config, tmp_path, monkeypatch):
    config, relative = write_config(), "checkpoint.dir=kept"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    opened(config, relative).metrics.write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(
        CheckpointError, match=r"there/kept/tiny holds no checkpoint.* its own in \S+/here/kept/tiny; set"
    ):
        opened(config, relative)
    monkeypatch.chdir(tmp_path / "here")
    opened(config, relative)


GONE = RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")


def test_a_run_does_not_go_back_to_older_checkpoints_in_another_place(write_config, tmp_path):
    config, there = write_config(), f"checkpoint.dir={tmp_path}/there"
    first = opened(config)
    first.metrics.write_text('{"step": 1}\n')
    for step, folder in ((5, first.checkpoints), (9, tmp_path / "there/tiny")):
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}/COMMITTED").write_text("")
    opened(config, there)
    with pytest.raises(CheckpointError, match=r"up to step 5, and .* kept its own up to step 9 in .*there"):
        opened(config)


@pytest.mark.parametrize(("half_lives", "said"), [((100,), []), ((100, 5000), ["5000: capped at 960 by the end"])])
def test_a_half_life_that_the_run_is_too_short_for_is_said(write_config, half_lives, said):
    config = load_config(write_config(), ["train.total_samples=9600", f"ema.half_life_samples={list(half_lives)}"])
    lines = unreachable_half_lives(config)
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        (False, None, "done"),
        (True, None, "signal"),
        (True, StoppedEarlyError("SIGTERM"), "signal"),
        (False, ValueError("the disk is full"), "failed: the disk is full"),
        (True, ValueError("the disk is full"), "failed: the disk is full"),
        (False, GONE, "failed: another rank was lost"),
        (True, GONE, "signal"),
    ],
)
def test_how_an_attempt_ended_is_on_record(write_config, asked, error, reason):
    directory = opened(write_config())
    end_attempt(directory, asked, type(error), error, None)
    (attempt,) = directory.attempts()
    assert attempt["reason"] == reason
    file = directory.lineage.stat().st_ino
    end_attempt(RunDirectory(directory.path), False, None, None, None)  # of a rank that began none
    assert directory.attempts() == [attempt]
    assert directory.lineage.stat().st_ino == file  # not even written anew: rank 0 may be at it


def test_a_full_disk_at_the_end_hides_nothing(write_config, monkeypatch):
    directory = SimpleNamespace(end_attempt=lambda reason: (_ for _ in ()).throw(OSError("full")))
    end_attempt(directory, False, None, None, None)


def train_alone(config, *overrides, **environment):
    """One process without a launcher; its standard output and its standard error, in lines."""
    command = [sys.executable, "-m", "ecar_dist", "train", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), done.stderr


def goodput_notes(run, step):
    return read_manifest(run / f"checkpoints/step-{step:08d}")["notes"]["goodput"]["kept_seconds"]


def test_a_run_goes_on_with_what_it_knew_and_says_what_is_new(write_config, tree, tmp_path):
    tree["log"]["tensorboard"], run = True, tmp_path / "runs/tiny"
    config = write_config()
    faults = "train.loss:step=2:nan,train.step:step=3:delay=2"
    _, error = train_alone(config, "train.total_samples=64", ECAR_FAILPOINT=faults)
    assert f"warning: faults will strike in this run on purpose (ECAR_FAILPOINT={faults}); unset it to train" in error
    changes = ("train.total_samples=128", "batch.global_batch_size=32", "optim.learning_rate=5e-4")
    said, error = train_alone(config, *changes)
    assert "faults" not in error
    assert [line for line in said if line.startswith("config on resume: ")] == [
        "config on resume: batch.global_batch_size 16 -> 32 (changes optimisation)",
        "config on resume: optim.learning_rate 0.001 -> 0.0005 (changes optimisation)",
        "config on resume: train.total_samples 64 -> 128 (safe)",
    ]
    assert any("6 steps; resuming at step 4 (64 samples)" in line for line in said)
    metrics = read_metrics(config)
    assert [(line["step"], line["samples_seen"]) for line in metrics] == [
        (1, 16),
        (2, 32),
        (3, 48),
        (4, 64),
        (5, 96),
        (6, 128),
    ]
    assert metrics[-1]["train/skipped_steps"] == 1  # of the attempt before
    assert goodput_notes(run, 6) > goodput_notes(run, 4) > 2  # seconds
    assert 0 < metrics[-1]["perf/goodput"] < 1
    before, now = RunDirectory(run).attempts()
    assert (before["reason"], before["newest_step"], before["resumed_from_step"]) == ("done", None, None)
    assert (now["reason"], now["newest_step"], now["resumed_from_step"]) == ("done", 4, 4)
    assert (now["precision"], now["dataset_ids"]) == ("fp32", before["dataset_ids"])
    assert RunDirectory(run).load_config().optim.learning_rate == 5e-4
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
