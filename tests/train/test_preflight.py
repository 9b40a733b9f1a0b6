"""The preflight of real ranks, each of which acts as a node of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import ecar_dist.train.preflight as module
from ecar_dist.config.read import config_from_dict
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.train.preflight import LOCAL_SECONDS, REMOTE_SECONDS, _reads_remotely, folders
from tests.conftest import free_port
from tests.fork_server import run_ranks


@pytest.fixture
def launch(write_config, tmp_path, monkeypatch):
    """Run a command on two ranks, one per node. Returns their statuses and lines, and the folder of the job's logs."""
    logs = tmp_path / "runs/tiny/logs/job-7"
    logs.mkdir(parents=True)
    monkeypatch.setenv("ECAR_JOB_LOGS", str(logs))

    def run(command, *overrides, failpoint=""):
        nodes = {rank: {"SLURMD_NODENAME": f"n{rank + 1}", "ECAR_FAILPOINT": failpoint} for rank in range(2)}
        ended = run_ranks(2, free_port(), command, str(write_config()), *overrides, more=nodes)
        error = "".join(one.stderr for one in ended)
        return [one.returncode for one in ended], ended[0].stdout.splitlines(), error, logs

    return run


def test_a_run_on_two_nodes_says_what_they_are(launch, tmp_path):
    status, said, error, logs = launch("train", "train.total_samples=16")
    assert status == [0, 0], error
    assert [line.partition(" ")[0] for line in said[:4]] == ["preflight:"] * 3 + ["run"]
    assert said[0].startswith("preflight: 2 nodes (n1, n2) x 1 rank; CPU ")
    assert "latents/000000.tar in " in said[1]
    assert "GiB for the run (n" in said[1]
    assert said[2].startswith("preflight: all-reduce of 16 MiB over 2 ranks at ")
    assert (logs / "exit-status").read_text() == "0\n"
    found = json.loads((logs / "preflight.json").read_text())
    assert [(rank["rank"], rank["node"]) for rank in found["ranks"]] == [(0, "n1"), (1, "n2")]
    assert found["all_reduce"]["bus_bytes_per_second"] > 1e6
    assert 0 <= found["clock_skew_seconds"] < 5
    assert not (logs / "bad-nodes").exists()
    assert RunDirectory(tmp_path / "runs/tiny").attempts()[0]["reason"] == "done"


def test_a_node_that_fails_is_named_and_nothing_is_begun(launch, tmp_path):
    status, said, error, logs = launch("train", failpoint="preflight.read:rank=1:eio")
    assert status == [75, 75]
    assert (logs / "exit-status").read_text() == "75\n"
    assert (logs / "bad-nodes").read_text() == "n2\n"
    (line,) = [line for line in error.splitlines() if line.startswith("ecar-dist:")]
    assert "node n2 " in line
    assert "preflight.read: Input/output error" in line
    assert said == []
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == ["logs"]


def test_a_device_that_fails_on_every_node_is_not_the_fault_of_a_node(launch):
    status, said, error, logs = launch("preflight", failpoint="preflight.device:raise")
    assert status == [1, 1]
    assert "RuntimeError: failpoint preflight.device" in error
    assert not list(logs.iterdir())  # no training, so no exit status from it
    assert said == []


def test_what_is_looked_at_follows_from_the_config(tree, tmp_path):
    config = config_from_dict(tree)
    assert folders(config) == {"for the run": tmp_path / "runs/tiny", "in /dev/shm": Path("/dev/shm")}
    tree["data"] |= {"latents": "s3://bucket/set", "cache": {"dir": "/scratch"}}
    tree["checkpoint"]["dir"] = "/lustre"
    remote = config_from_dict(tree)
    assert folders(remote)["for the cache"] == Path("/scratch")
    assert folders(remote)["for checkpoints"] == Path("/lustre")
    assert (_reads_remotely(config), _reads_remotely(remote)) == (False, True)
    assert LOCAL_SECONDS < REMOTE_SECONDS
    tree["checkpoint"]["dir"] = "s3://bucket/checkpoints"
    assert "for checkpoints" not in folders(config_from_dict(tree))


def test_one_rank_of_each_node_reads_the_beginning_of_the_data(tree, monkeypatch):
    """Otherwise all of them would read the same bytes past their node's cache."""
    monkeypatch.setattr(module, "preflight", lambda world, folders, read, seconds: (read()[1]["bytes"], []))
    monkeypatch.setattr(module, "agree_on", lambda *_: None)
    monkeypatch.setattr(module, "data_facts", lambda *_: {})
    config, nodes = config_from_dict(tree), ("n1", "n1", "n2", "n2")
    worlds = [SimpleNamespace(rank=rank, nodes=nodes, is_first=rank == 0) for rank in range(4)]
    size = load_manifest(tree["data"]["latents"]).shards[0].bytes
    assert [module.check_nodes(config, world) for world in worlds] == [size, 0, size, 0]
