"""The cluster that all tests of this folder share."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

NODES = 7
SPARE = 3  # in their own partition, for the test that loses one of them


def pytest_collection_modifyitems(items):
    """If no cluster can run here, its tests are skipped, and a warning at the end of the session reports it."""
    ours = [item for item in items if item.get_closest_marker("slurm")]
    if not ours or os.environ.get("ECAR_REQUIRE_SLURM") == "1" or not (reason := missing()):
        return
    said = f"NO SLURM: {len(ours)} tests on a real Slurm were NOT run: {reason}"
    warnings.warn(said, pytest.PytestWarning, stacklevel=1)
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=said))


@pytest.fixture(scope="session")
def cluster():
    """Nodes n1 to n10 with four fake GPUs each. A test that harms a node restores it."""
    assert not missing(), missing()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, NODES, SPARE)
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
