import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.start.roll_call import Answer
from ecar_dist.runtime.world import Placement, RemoteError, World, _judge_meeting, _local_device, _open_store
from tests.conftest import free_port


class PretendWorld(World):
    """Rank `rank` of ranks whose errors are known."""

    def __init__(self, rank, errors):
        self.rank, self.size, self._errors = rank, len(errors), errors

    def gather(self, value):
        return [error and str(error) for error in self._errors]


def test_the_first_failing_rank_says_why_and_the_others_say_nothing():
    errors = [None, ValueError("one"), ValueError("two")]
    raised = []
    for rank, error in enumerate(errors):
        with pytest.raises((ValueError, RemoteError)) as caught:
            PretendWorld(rank, errors).agree(error)
        raised.append(type(caught.value))
    assert raised == [RemoteError, ValueError, RemoteError]
    PretendWorld(0, [None, None]).agree(None)


def test_an_error_without_words_is_an_error():
    with pytest.raises(RemoteError):
        PretendWorld(0, [None, ValueError()]).agree(None)


def test_together_gives_the_value_or_the_error():
    world = World(Placement(), torch.device("cpu"))
    assert world.together(lambda: 3) == world.on_first_rank(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        world.together(lambda: (_ for _ in ()).throw(ValueError("mine")).__next__())
    with pytest.raises(RemoteError):
        PretendWorld(0, [None, ValueError("theirs")]).together(lambda: 3)


@pytest.mark.parametrize(("gpus", "local_rank", "number"), [(8, 7, 7), (1, 3, 0)])
def test_each_rank_of_a_node_has_its_gpu(monkeypatch, gpus, local_rank, number):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert _local_device(Placement(rank=9, size=16, local_rank=local_rank)) == torch.device("cuda", number)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ConfigError, match="rank 12 is number 5 on its node, which has 4 GPUs; start at most 4"):
        _local_device(Placement(rank=12, size=16, local_rank=4))


def in_threads(*actions):
    """Each in a thread; what they gave, or raised."""
    found = [None] * len(actions)

    def run(index):
        try:
            found[index] = actions[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def worlds(size):
    """Of ranks that have met, without a process group."""
    store = dist.HashStore()
    return [World(Placement(rank, size), torch.device("cpu"), store) for rank in range(size)]


def test_a_roll_call_gives_all_ranks_the_first_ones_verdict_on_all_texts():
    made = worlds(3)
    verdicts = in_threads(*(lambda w=w: w.roll_call("names", f"I am {w.rank}", 30, " | ".join) for w in made))
    assert verdicts == ["I am 0 | I am 1 | I am 2"] * 3


def test_a_roll_call_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("ecar_dist.runtime.world._VERDICT_SECONDS", 0.2)
    first, second, _ = worlds(3)
    said = in_threads(*(lambda w=w: w.roll_call("names", f"I am {w.rank}", 0.2, repr) for w in (first, second)))
    assert said == ["['I am 0', 'I am 1', None]"] * 2
    _, second, _ = worlds(3)
    with pytest.raises(RemoteError, match=r"rank 0 gave no verdict within 0\.4 s") as caught:
        second.roll_call("names", "I am 1", 0.2, repr)
    assert caught.value.again


def test_a_node_without_a_gpu_is_unfit_where_others_have_one():
    def meeting(*kinds):
        answers = [Answer(rank, f"n{rank}", "", {"device": kind}) for rank, kind in enumerate(kinds)]
        return _judge_meeting(answers, seconds=9)

    assert meeting("cuda", "cpu", "cuda").bad_nodes == ("n1",)
    assert "it has no GPU that torch can use, others have" in meeting("cuda", "cpu", "cuda").problem
    for same in ("cuda", "cpu"):
        assert meeting(same, same, same).problem == ""


UNDER_SRUN = """
import os, socket, sys
from ecar_dist.errors import NodeError
from ecar_dist.runtime import world as home
from ecar_dist.runtime.peers import RemoteError

rank, port, taken = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"

def start(size, job, port):
    placed = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_LOCALID": "0", "SLURM_JOB_ID": job}
    return home.start_world({**placed, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_STEP_NODELIST": "n1"})

home.MEETING_SECONDS = 60
if rank == 0:
    try:
        start(2, "1", taken)
    except NodeError as error:
        print("taken:", error)
os.environ["ECAR_JOB_LOGS"] = sys.argv[4]
home.MEETING_SECONDS = 8  # for a slow machine, where the second rank comes late
try:
    start(4, "2", port)  # ranks 2 and 3 are not there
except (NodeError, RemoteError) as error:
    print("missing:", type(error).__name__, error)
del os.environ["ECAR_JOB_LOGS"]
home.MEETING_SECONDS = 60
world = start(2, "3", sys.argv[5])
print("met:", world.nodes, world.gather(rank), round(world.all_reduce_seconds(1 << 16, 2)))
sys.stdout.flush()
os._exit(0)  # the teardown of gloo's threads may abort
"""


def test_ranks_under_srun_meet_by_themselves_and_say_what_keeps_them_from_it(tmp_path):
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
    assert first[0].startswith(f"taken: 127.0.0.1:{ports[1]} is taken by another process; run the same command again")
    assert first[1:] == [
        "missing: NodeError ranks 2, 3 did not come within 8 s (came: 0 on n1; 1 on n2)",
        "met: ('n1', 'n2') [0, 1] 0",
    ]
    assert second == ["missing: RemoteError rank 0 says what is wrong", first[2]]
    assert not (tmp_path / "bad-nodes").exists()  # those that came are fine, and the others have no name


def test_two_jobs_at_one_port_do_not_take_each_other_for_one():
    port = free_port()
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    first = _open_store(Placement(0, 2, master_port=port), job)
    first.set("name", "first")
    assert _open_store(Placement(1, 2, master_port=port), job).get("name") == b"first"
    for other in ({"SLURM_JOB_ID": "2"}, {"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "x"}):
        assert not _open_store(Placement(1, 2, master_port=port), job | other).check(["name"])


def test_where_torchruns_agent_holds_the_port_the_first_rank_is_a_guest():
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    _open_store(Placement(0, 2, master_port=port), {"TORCHELASTIC_USE_AGENT_STORE": "True"}).set("name", "guest")
    assert agent.num_keys() >= 1
