import pytest

from ecar_dist.runtime.watchdog.diagnosis import AGAIN, CALLED, FAILED, GONE, HUNG, LOST, RankReport, diagnose, suspects

WAITING = 'File "/site/torch/distributed/distributed_c10d.py", line 1 in all_reduce'


def report(rank, step=9, beat=3, phase="backward", kind=HUNG, **values):
    values = {"seconds": 600.0, "state": "S", "stacks": f"/logs/{rank}.txt", "innermost": WAITING, **values}
    return RankReport(rank, "gpu07", 4000 + rank, kind, phase, step, beat, **values)


def ranks_of(reports):
    return [one.rank for one in reports]


def test_the_one_behind_is_the_odd_one():
    reports = [report(0), report(1, step=8, beat=5, phase="log"), report(2)]
    assert diagnose(reports, 3, "/logs") == (
        'rank 1 (host gpu07, process 4001) has been in phase "log" of step 8 for 600 s while the others wait in '
        f'"backward" of step 9: its stacks are in /logs/1.txt; {AGAIN}'
    )


def test_within_a_step_the_beats_count_and_not_the_names_of_the_phases():
    """Micro-batch after micro-batch: a forward may be ahead of a backward."""
    reports = [
        report(0, beat=5, phase="forward"),
        report(1, beat=4, phase="backward"),
        report(2, beat=5, phase="forward"),
    ]
    assert ranks_of(suspects(reports)) == [1]


def test_among_ranks_in_one_phase_the_one_outside_a_collective_is_the_odd_one():
    reports = [report(0), report(1, innermost='File "loader.py", line 4 in take')]
    assert ranks_of(suspects(reports)) == [1]
    assert 'rank 1 (host gpu07, process 4001) has been in phase "backward" of step 9' in diagnose(reports, 2, "/logs")


def test_else_the_one_on_another_line_than_most():
    on_a_device = [report(rank, innermost='File "loop.py", line 7 in step') for rank in range(3)]
    apart = report(3, innermost='File "loop.py", line 8 in step')
    assert ranks_of(suspects([*on_a_device, apart])) == [3]
    assert ranks_of(suspects([on_a_device[0], apart])) == [0, 3]  # no majority


def test_if_no_rank_is_behind_all_are_named():
    assert diagnose([report(0), report(1)], 2, "/logs") == (
        f'ranks 0 and 1 have all been in phase "backward" of step 9 for 600 s, and none is behind: their stacks are '
        f"in /logs; {AGAIN}"
    )


def test_a_rank_without_a_report_is_the_odd_one_if_the_others_are_alike():
    line = diagnose([report(0), report(2)], 4, "/logs")
    assert line.startswith('ranks 1 and 3 gave no sign of life while the others waited in phase "backward" of step 9;')
    behind = [report(0), report(2, step=8)]
    assert "rank 2 (host" in diagnose(behind, 3, "/logs")
    assert "(rank 1 gave no sign of life)" in diagnose(behind, 3, "/logs")


@pytest.mark.parametrize("state", ["T", "t"])
def test_a_stopped_rank_comes_before_one_behind(state):
    line = diagnose([report(0, step=8), report(1, state=state, stacks="")], 2, "/logs")
    assert "rank 1 (host gpu07, process 4001) has been stopped by a signal or a debugger in" in line
    assert f"it wrote no stacks (process state {state})" in line


def test_a_rank_that_is_gone_comes_first():
    gone = report(2, kind=GONE, state="", stacks="", words="the kernel's out-of-memory killer ended a process")
    line = diagnose([report(0, state="T"), report(1, kind=LOST, words="closed"), gone], 3, "/logs")
    assert line == (
        'rank 2 (host gpu07, process 4002) has been gone since phase "backward" of step 9: killed or crashed (the '
        f"kernel's out-of-memory killer ended a process); {AGAIN}"
    )


def test_a_rank_that_failed_prints_its_own_error():
    assert (
        diagnose([report(0, kind=CALLED), report(1, kind=FAILED), report(2, kind=LOST, words="closed")], 3, "/") is None
    )


def test_a_lost_connection_without_a_cause():
    line = diagnose([report(0, kind=CALLED), report(1, kind=LOST, words="Connection closed by peer")], 2, "/logs")
    assert line == (
        'rank 1 lost contact with another rank in phase "backward" of step 9 (Connection closed by peer); ' + AGAIN
    )


def test_a_line_about_many_ranks_is_short():
    gone = [report(rank, kind=GONE) for rank in range(20)]
    assert "process 4000), like ranks 1, 2, 3, 4, 5, 6, 7 and 12 more, has been gone" in diagnose(gone, 20, "/logs")
