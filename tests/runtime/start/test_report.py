import pytest

from ecar_dist.runtime.start.report import different_versions, report, report_lines, warnings
from ecar_dist.runtime.start.roll_call import Answer, decide

GIB = 2**30


def answer(rank, node, *, problem="", clock=100.0, free=50, seconds=0.01, device="NVIDIA H200", **versions):
    found = {"ecar_dist": "1", "torch": "2.13", "deepspeed": "0.19", "python": "3.11", "cuda": "13.0", "nccl": None}
    facts = {
        "clock": clock,
        "device": device,
        "driver": "580.1",
        "versions": found | versions,
        "free": {"for the run": free * GIB, "in /dev/shm": 9 * GIB},
        "read": {"where": "/data/000000.tar", "bytes": 4 << 20, "seconds": seconds},
    }
    return Answer(rank, node, problem, facts)


def test_the_lines_of_two_nodes():
    found = report(
        [answer(0, "n1"), answer(1, "n1"), answer(2, "n2", free=7, clock=101.5), answer(3, "n2", seconds=0.5)],
        12.5e9,
        16 << 20,
        1.26,
    )
    assert report_lines(found) == [
        (
            "preflight: 2 nodes (n1, n2) x 2 ranks; NVIDIA H200, driver 580.1, ecar_dist 1, torch 2.13, "
            "deepspeed 0.19, python 3.11, cuda 13.0"
        ),
        (
            "preflight: slowest read 4.0 MiB of /data/000000.tar in 0.50 s (n2); least free space 7.0 GiB for the run "
            "(n2), 9.0 GiB in /dev/shm (n1)"
        ),
        (
            "preflight: all-reduce of 16 MiB over 4 ranks at 12.50 GB/s (bus bandwidth); clocks within 1.50 s; "
            "preflight took 1.3 s"
        ),
    ]


def test_alone_there_is_no_all_reduce_and_no_node_to_name():
    lines = report_lines(report([answer(0, "n1")], None, 16 << 20, 0.1))
    assert len(lines) == 2
    assert lines[0].startswith("preflight: 1 node (n1) x 1 rank; NVIDIA H200")
    assert lines[1].endswith("9.0 GiB in /dev/shm; preflight took 0.1 s")
    assert "(n1)" not in lines[1]


def test_a_harmless_difference_is_a_warning():
    different = [answer(0, "n1"), answer(1, "n2", device="NVIDIA H100", python="3.12"), answer(2, "n3", clock=131)]
    assert warnings(different) == [
        "different device: NVIDIA H200 on n1, n3, NVIDIA H100 on n2",
        "different python: 3.11 on n1, n3, 3.12 on n2",
        (
            "the clock of node n3 is 31 s ahead of that of node n1; object stores refuse requests with a wrong time, "
            "and logs cannot be compared: synchronize the clocks with NTP"
        ),
    ]
    assert warnings([answer(0, "n1"), answer(1, "n2", clock=109.0)]) == []
    assert report_lines(report(different, None, 1, 1.0))[-3:] == [f"warning: {line}" for line in warnings(different)]


@pytest.mark.parametrize("name", ["ecar_dist", "torch", "deepspeed"])
def test_ranks_of_different_versions_do_not_train_together(name):
    found = [answer(0, "n1"), answer(1, "n2", **{name: "0"})]
    decision = decide(found, seconds=9, mismatch=different_versions)
    assert f"different {name}: " in decision.problem
    assert "0 on n2" in decision.problem
    assert (decision.again, decision.bad_nodes) == (False, ())
    assert decide(found[:1], seconds=9, mismatch=different_versions).problem == ""


def test_an_unfit_node_comes_before_a_version():
    found = [answer(0, "n1"), answer(1, "n2", problem="no disk", torch="0"), None, answer(3, "n4")]
    nodes = ("n1", "n2", "n3", "n4")
    decision = decide(found, seconds=9, nodes_by_rank=nodes, mismatch=different_versions)
    assert decision.bad_nodes == ("n2", "n3")
