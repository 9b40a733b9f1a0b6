"""One undisturbed run on two ranks, for all tests that disturb similar runs."""

import pytest

from tests.conftest import losses, train_on_ranks, write_yaml
from tests.train.struck_ranks import Run


@pytest.fixture(scope="session")
def undisturbed(make_tree, tmp_path_factory):
    """The config tree of a run of 10 steps that saves after every fourth step, and its losses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tree = make_tree(folder) | {"train": {"total_samples": 160}, "checkpoint": {"every_samples": 64}}
    return tree, losses(train_on_ranks(2, write_yaml(tree, folder)))


@pytest.fixture
def run(undisturbed, tmp_path):
    """The same run again, in its own folder."""
    tree = undisturbed[0] | {"run": undisturbed[0]["run"] | {"dir": str(tmp_path / "runs")}}
    return Run(write_yaml(tree, tmp_path), tmp_path / "runs/tiny")
