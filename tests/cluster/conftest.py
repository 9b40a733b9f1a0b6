"""Stand-ins for Slurm's commands with a given behaviour, for cases that are too rare to wait for on a real Slurm."""

import os
import sys

import pytest

STAND_IN = """\
#!{python}
import os, sys
folder, name = {folder!r}, os.path.basename(sys.argv[0])
with open(os.path.join(folder, "calls"), "a") as calls:
    calls.write(repr([name, *sys.argv[1:]]) + "\\n")
try:
    code = open(os.path.join(folder, name + ".does")).read()
except FileNotFoundError:
    code = "print(40 + len(open(folder + '/calls').readlines()))" if name == "sbatch" else ""
exec(code)
"""


class StandIns:
    def __init__(self, folder):
        self.folder = folder

    def does(self, name, code):
        """Set the Python code that the command runs from now on."""
        (self.folder / f"{name}.does").write_text(code)

    @property
    def calls(self):
        path = self.folder / "calls"
        return [eval(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """sbatch, squeue and scancel that record their calls. sbatch returns the ids 41, 42, ... by number of the call."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("sbatch", "squeue", "scancel"):
        path = folder / name
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return StandIns(folder)
