"""One run directory, one owner: of two that start at once one is refused, and one that was suspended cannot commit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.checkpoint.files import committed
from ecar_dist.runtime.run.directory import RunDirectory
from tests.runtime.checkpoint.worlds import make_config, save


def test_of_two_starts_at_the_same_time_one_is_refused(tmp_path):
    """An flock belongs to an open file, so threads compete as processes do."""
    for trial in range(100):
        start, path = threading.Barrier(2), tmp_path / str(trial)

        def claim(_, start=start, path=path):
            directory = RunDirectory(path)
            start.wait()
            try:
                directory.open_for_training()
            except ConfigError:
                return None
            return directory

        with ThreadPoolExecutor(2) as pool:
            owners = [directory for directory in pool.map(claim, range(2)) if directory]
        assert len(owners) == 1


def test_an_owner_that_wakes_up_after_another_took_over_commits_nothing(tmp_path):
    """Where locks have no effect (some network file systems), the record of attempts still shows who owns the run."""
    slept, config = RunDirectory(tmp_path / "tiny"), make_config(tmp_path)
    for trial in range(20):
        slept.open_for_training()
        slept.begin_attempt()
        save(config, step=4, still_ours=slept.is_ours)
        slept._lock.close()  # the file system forgot it
        slept._lock = None
        RunDirectory(tmp_path / "tiny").begin_attempt()
        with pytest.raises(CheckpointError, match="another attempt has taken over"):
            save(config, step=8 + trial, still_ours=slept.is_ours)
    assert [path.name for path in committed(tmp_path / "tiny/checkpoints")] == ["step-00000004"]
