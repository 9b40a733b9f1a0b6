"""The cluster that all tests of this folder share."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

REASON = pytest.StashKey[str]()
NODES = 7


def pytest_collection_modifyitems(config, items):
    """Where there can be no cluster these tests are skipped, and pytest_terminal_summary says so."""
    ours = [item for item in items if item.get_closest_marker("slurm")]
    if not ours or os.environ.get("ECAR_REQUIRE_SLURM") == "1" or not (reason := missing()):
        return
    config.stash[REASON] = f"{len(ours)} tests on a real Slurm were NOT run: {reason}"
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    if REASON in config.stash:
        terminalreporter.section("no Slurm", sep="!", red=True, bold=True)
        terminalreporter.line(config.stash[REASON], red=True, bold=True)


@pytest.fixture(scope="session")
def cluster():
    """Seven nodes, n1 to n7, with four GPUs each, in name. A test that harms a node mends it."""
    assert not missing(), missing()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, NODES)
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
