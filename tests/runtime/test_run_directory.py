import os
import subprocess
import sys

import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run_directory import RunDirectory

OWNER = """
import sys, time
from ecar_dist.runtime.run_directory import RunDirectory
directory = RunDirectory(sys.argv[1])
directory.open_for_training()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path):
    run = tmp_path / "run"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"process {owner.pid} on \S+ trains in .*run; wait for its end, or choose"):
        RunDirectory(run).open_for_training()
    owner.kill()
    owner.wait()
    held = RunDirectory(run)
    held.open_for_training()
    assert str(os.getpid()) in (run / ".lock").read_text()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):  # another open file of the same process
        RunDirectory(run).open_for_training()


def test_a_start_that_was_cut_short_may_be_made_again(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on gone\n")
    RunDirectory(tmp_path).open_for_training()
    assert (tmp_path / "lineage.json").exists()
