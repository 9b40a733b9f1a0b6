import pytest

from ecar_dist.runtime.placement import Placement, first_host, placement_from_environment, threads_of_rank

UNDER_SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


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
    assert placement_from_environment(UNDER_SRUN) == Placement(5, 8, 1, 4, "gpu07", 20000 + 123456 % 12000)


@pytest.mark.parametrize(("node", "size"), [("0", 2), ("1", 4), ("2", 4), ("3", 1)])
def test_nodes_may_have_different_numbers_of_ranks(node, size):
    placed = UNDER_SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,4(x2),1", "SLURM_NODEID": node}
    assert placement_from_environment(placed).local_size == size


def test_each_attempt_and_step_of_a_job_has_its_own_port():
    def port(restarts, step):
        count = {"SLURM_RESTART_COUNT": str(restarts), "SLURM_STEP_ID": str(step)}
        return placement_from_environment(UNDER_SRUN | count).master_port

    attempts, steps = {port(restarts, 0) for restarts in range(1000)}, {port(3, step) for step in range(100)}
    assert (len(attempts), len(steps)) == (1000, 100)
    assert 20000 <= min(attempts | steps) <= max(attempts | steps) < 32000
    assert placement_from_environment(UNDER_SRUN | {"MASTER_PORT": "7", "MASTER_ADDR": "a"}).master_port == 7


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


@pytest.mark.parametrize(
    ("environment", "local_size", "threads"),
    [({}, 1, 8), ({}, 3, 2), ({}, 16, 1), ({"OMP_NUM_THREADS": "3"}, 1, None)],
)
def test_a_rank_has_its_share_of_the_cores_unless_told_otherwise(environment, local_size, threads):
    assert threads_of_rank(environment, local_size, cores=8) == threads
