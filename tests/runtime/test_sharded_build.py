"""ZeRO 3 on two ranks: neither ever holds a full model, and their shares have the values of a full one."""

import json

import pytest

from tests.conftest import free_port, write_yaml
from tests.fork_server import run_ranks
from tests.runtime.sharded_build import DEPTH, SETTINGS
from tests.runtime.sharded_build_ranks import build_on_ranks


@pytest.fixture(scope="module")
def reports(make_tree, tmp_path_factory):
    """What each rank reports."""
    folder = tmp_path_factory.mktemp("build")
    tree = make_tree(folder) | {"flow": {"num_stages": 2}}
    tree["model"] |= {"ar_depth": DEPTH, "flow_depth": DEPTH}
    tree["deepspeed"] |= {"zero_stage": 3, "raw": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    files = (str(write_yaml(tree, folder)), str(folder / "report.json"))
    ended = run_ranks(2, free_port(), *files, main=build_on_ranks, timeout=300)
    assert not any(one.returncode for one in ended), "".join(one.stdout + one.stderr for one in ended)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_rank_holds_half_of_a_model_and_one_module(reports, setting):
    for report in reports:
        assert report[setting]["peak"] < (0.4 if "bf16" in setting else 0.65)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_initial_weights_are_those_of_a_whole_model_to_the_bit(reports, setting):
    assert all(report[setting]["equal"] for report in reports)
    assert reports[0][setting]["parameters"] > 50


def test_the_losses_are_those_of_a_model_that_was_built_whole(reports):
    found = reports[0]["losses"]
    assert found["sharded"] == found["whole"]
    assert len(set(found["whole"])) == 3
