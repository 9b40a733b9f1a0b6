"""What a start refuses, and what it puts on record."""

from types import SimpleNamespace

import pytest
import torch

from ecar_dist.config_file import load_config
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.runtime.stop import StoppedEarlyError
from ecar_dist.runtime.world import Placement, World
from ecar_dist.train.start import end_attempt, open_attempt

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


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        (False, None, "done"),
        (True, None, "signal"),
        (True, StoppedEarlyError("SIGTERM"), "signal"),
        (False, ValueError("the disk is full"), "failed: the disk is full"),
    ],
)
def test_how_an_attempt_ended_is_on_record(write_config, asked, error, reason):
    directory = opened(write_config())
    end_attempt(directory, asked, type(error), error, None)
    (attempt,) = directory.attempts()
    assert attempt["reason"] == reason
    end_attempt(RunDirectory(directory.path), False, None, None, None)  # of a rank that began none
    assert directory.attempts() == [attempt]


def test_a_full_disk_at_the_end_hides_nothing(write_config, monkeypatch):
    directory = SimpleNamespace(end_attempt=lambda reason: (_ for _ in ()).throw(OSError("full")))
    end_attempt(directory, False, None, None, None)
