import json
import time

import pytest
import torch

from ecar_dist.errors import DataError, NodeError
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.start import preflight as home
from ecar_dist.runtime.start.preflight import free_space, preflight, try_device, versions
from ecar_dist.runtime.world import World

ALONE = World(Placement(), torch.device("cpu"))
READ = {"where": "/data/0.tar", "bytes": 1, "seconds": 0.5}


def test_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_JOB_LOGS", str(tmp_path))
    value, lines = preflight(ALONE, {"here": tmp_path}, lambda: ("data", READ), seconds=30)
    assert value == "data"
    assert lines[0].startswith("preflight: 1 node")
    assert "of /data/0.tar in 0.50 s; least free space " in lines[1]
    written = json.loads((tmp_path / "preflight.json").read_text())
    facts = written["ranks"][0]["facts"]
    assert facts["versions"] == json.loads(json.dumps(versions()))
    assert facts["read"] == READ
    assert facts["free"]["here"] > 0
    assert facts["clock"] == ALONE.met


def test_without_a_job_script_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("ECAR_JOB_LOGS", raising=False)
    monkeypatch.chdir(tmp_path)
    preflight(ALONE, {"here": tmp_path}, lambda: ("data", READ), seconds=30)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_only_node_is_its_own(tmp_path):
    def broken():
        raise DataError("no manifest")

    with pytest.raises(DataError, match=r"^no manifest$"):
        preflight(ALONE, {}, broken, seconds=30)


def test_a_read_that_hangs_is_not_waited_for(monkeypatch):
    for name in ("versions", "driver", "try_device"):  # which take longer on a slow machine
        monkeypatch.setattr(home, name, lambda *_: None)
    began = time.monotonic()
    with pytest.raises(NodeError, match=r"^reading the data took more than 0\.5 s$"):
        preflight(ALONE, {}, lambda: time.sleep(100), seconds=0.5)
    assert time.monotonic() - began < 20


def test_a_device_that_computes_wrong_is_noticed(monkeypatch):
    assert try_device(torch.device("cpu")).startswith("CPU ")
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: right(a, b) + (a.dtype == torch.float32) * torch.eye(len(a))
    )
    with pytest.raises(NodeError, match=r"^cpu "):
        try_device(torch.device("cpu"))


def test_free_space_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
    found = free_space({"here": tmp_path, "later": tmp_path / "not/yet"})
    assert found["here"] > 0
    assert found["later"] == pytest.approx(found["here"], rel=0.1)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"^cannot write to {tmp_path}$"):
        free_space({"later": tmp_path / "not/yet"})


def test_the_folder_of_the_job_must_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(home, "APPEARS_SECONDS", 0.1)
    monkeypatch.setenv("ECAR_JOB_LOGS", str(tmp_path / "logs"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "logs")):
        free_space({})
    (tmp_path / "logs").mkdir()
    assert free_space({}) == {}
