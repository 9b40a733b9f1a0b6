"""Ranks meet on their own, and a rank that cannot join is named."""

import os
import resource
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.placement import Placement
from ecar_dist.runtime.start import rendezvous
from ecar_dist.runtime.start.rendezvous import decide_on_devices, local_device, open_store
from ecar_dist.runtime.start.roll_call import Answer
from tests.conftest import free_port


@pytest.mark.parametrize(("gpus", "local_rank", "number"), [(8, 7, 7), (1, 3, 0)])
def test_each_rank_of_a_node_has_its_gpu(monkeypatch, gpus, local_rank, number):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert local_device(Placement(rank=9, size=16, local_rank=local_rank)) == torch.device("cuda", number)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"rank 12 .*5 .*4 GPUs"):
        local_device(Placement(rank=12, size=16, local_rank=4))


def test_a_node_without_a_gpu_is_unfit_if_others_have_one():
    def decision(*kinds):
        answers = [Answer(rank, f"n{rank}", "", {"device": kind}) for rank, kind in enumerate(kinds)]
        return decide_on_devices(answers, seconds=9)

    assert decision("cuda", "cpu", "cuda").bad_nodes == ("n1",)
    assert "it has no GPU that torch can use, others have" in decision("cuda", "cpu", "cuda").problem
    for same in ("cuda", "cpu"):
        assert decision(same, same, same).problem == ""


UNDER_SRUN = """
import os, pathlib, sys, time
from ecar_dist.errors import NodeError
from ecar_dist.runtime.start import rendezvous as home
from ecar_dist.runtime.peers import RemoteError

rank, port, taken = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"

def start(size, job, port):
    placed = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_LOCALID": "0", "SLURM_JOB_ID": job}
    return home.start_world({**placed, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_STEP_NODELIST": "n1"})

home.RENDEZVOUS_SECONDS = 60
if rank == 0:
    try:
        start(2, "1", taken)
    except NodeError as error:
        print("taken:", error)
os.environ["ECAR_JOB_LOGS"] = sys.argv[4]
logs = pathlib.Path(sys.argv[4])
(logs / f"{rank}-is-here").touch()
while len(list(logs.glob("*-is-here"))) < 2:  # a slow machine takes seconds to import torch
    time.sleep(0.01)
home.RENDEZVOUS_SECONDS = 8
try:
    start(4, "2", port)  # ranks 2 and 3 do not exist
except (NodeError, RemoteError) as error:
    print("missing:", type(error).__name__, error)
del os.environ["ECAR_JOB_LOGS"]
home.RENDEZVOUS_SECONDS = 60
world = start(2, "3", sys.argv[5])
print("met:", world.nodes, world.gather(rank), round(world.all_reduce_seconds(1 << 16, 2)))
sys.stdout.flush()
os._exit(0)  # the teardown of gloo's threads may abort
"""


def test_ranks_under_srun_meet_or_say_why_they_cannot(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ports = [str(free_port()), str(taken.getsockname()[1]), str(tmp_path), str(free_port())]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", UNDER_SRUN, str(rank), *ports],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    first, second = ([line for line in out.splitlines() if ":" in line] for out, _ in said)
    assert first[0].startswith(f"taken: 127.0.0.1:{ports[1]} is in use")
    assert first[1:] == [
        "missing: NodeError ranks 2, 3 did not join within 8 s (joined: 0 on n1; 1 on n2)",
        "met: ('n1', 'n2') [0, 1] 0",
    ]
    assert second == ["missing: RemoteError rank 0 reports what is wrong", first[2]]
    assert not (tmp_path / "bad-nodes").exists()  # those that joined are fine, the other nodes are unknown


def test_two_jobs_at_one_port_do_not_mix():
    port = free_port()
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    first = open_store(Placement(0, 2, master_port=port), job)
    first.set("name", "first")
    assert open_store(Placement(1, 2, master_port=port), job).get("name") == b"first"
    for other in ({"SLURM_JOB_ID": "2"}, {"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "x"}):
        assert not open_store(Placement(1, 2, master_port=port), job | other).check(["name"])


def test_under_torchrun_the_first_rank_uses_the_store_of_the_agent():
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    open_store(Placement(0, 2, master_port=port), {"TORCHELASTIC_USE_AGENT_STORE": "True"}).set("name", "guest")
    assert agent.num_keys() >= 1


def test_many_files_are_allowed_before_the_first_connection(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = []
    monkeypatch.setattr(rendezvous, "open_store", lambda *_: seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)))
    monkeypatch.setattr(rendezvous, "_meet", lambda *_: 1 / 0)
    monkeypatch.setattr(rendezvous, "threads_of_rank", lambda *_: 0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        with pytest.raises(ZeroDivisionError):
            rendezvous.start_world({})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert seen == [(limits[1], limits[1])]
