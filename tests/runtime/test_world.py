import pytest
import torch

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.world import (
    Placement,
    RemoteError,
    World,
    _local_device,
    first_host,
    placement_from_environment,
)


def test_alone():
    assert placement_from_environment({}) == Placement()


def test_under_torchrun():
    found = placement_from_environment(
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": "7",
        }
    )
    assert found == Placement(5, 8, 1, 4, "n1", 7)


def test_under_srun():
    found = placement_from_environment(
        {
            "SLURM_PROCID": "5",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
            "SLURM_JOB_ID": "123456",
        }
    )
    assert found == Placement(5, 8, 1, 4, "gpu07", 20000 + 123456 % 20000)


def test_an_interactive_allocation_without_srun_is_one_process():
    assert placement_from_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) == Placement()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a[7,9]", "a7"),
        ("rack1-n[2-4]-ib", "rack1-n2-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


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
