"""The verdict, and what makes a rank slow."""

import pytest

from ecar_dist.train.time_budget import SLOW_INTERVALS, SlowRank, Stragglers, TimeBudget

COMPUTE = {"forward": 4.0, "backward": 4.0, "optimizer": 1.0, "data": 0.5, "checkpoint": 0.2, "log": 0.1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "compute-bound"),
        ({"data_wait": 4.1}, "data-bound: 41% of the time waits for data"),
        ({"data_wait": 0.99}, "compute-bound"),
        ({"data_wait": 25.0}, "data-bound: 100% of the time waits for data"),
        ({"phases": {**COMPUTE, "checkpoint": 1.2}}, "checkpoint-bound: 12% of the time waits for checkpoints"),
        ({"phases": {**COMPUTE, "checkpoint": 0.4}}, "compute-bound"),
        ({"phases": {**COMPUTE, "checkpoint": 1.2}, "data_wait": 2.0}, "data-bound: 20% of the time waits for data"),
        ({"phases": {**COMPUTE, "preview": 3.0}}, "preview-bound: 30% of the time goes into preview"),
        ({"phases": {**COMPUTE, "log": 2.0}}, "log-bound: 20% of the time goes into log"),
        (
            {"slow": SlowRank(3, 1.42, "forward"), "data_wait": 5.0},
            "rank 3 is 1.4x slower than the median rank (forward)",
        ),
    ],
)
def test_the_verdict_names_what_to_mend_first(changes, said):
    budget = TimeBudget(**{"elapsed": 10.0, "phases": COMPUTE, **changes})
    assert budget.verdict() == said


def test_shares_are_of_the_interval():
    shares = TimeBudget(20.0, COMPUTE).shares()
    assert shares["forward"] == 0.2
    assert sum(shares.values()) == pytest.approx(9.8 / 20)
    assert TimeBudget(0.0, COMPUTE).shares()["forward"] == 0.0  # an interval without time


def test_only_another_kind_of_verdict_is_news():
    assert TimeBudget(10.0, data_wait=4.0).kind() == TimeBudget(10.0, data_wait=6.0).kind() == "data-bound"
    assert TimeBudget(10.0).kind() == "compute-bound"
    slow, slower, other = (SlowRank(3, 1.4, "forward"), SlowRank(3, 1.9, "data"), SlowRank(2, 1.4, "forward"))
    assert TimeBudget(10.0, slow=slow).kind() == TimeBudget(10.0, slow=slower).kind()
    assert TimeBudget(10.0, slow=slow).kind() != TimeBudget(10.0, slow=other).kind()


def forward(*seconds):
    return [{"forward": one, "data": 0.0} for one in seconds]


def observe_all(intervals, elapsed=10.0):
    stragglers = Stragglers()
    return [stragglers.observe(own, elapsed) for own in intervals]


def test_a_rank_is_slow_after_three_intervals_in_a_row_and_no_longer_when_it_recovers():
    slow, even = forward(4.0, 4.1, 5.6, 4.0), forward(4.0, 4.1, 4.2, 4.0)
    seen = observe_all([slow, slow, slow, slow, even, slow, slow, slow])
    assert [found is not None for found in seen] == [False, False, True, True, False, False, False, True]
    assert (seen[2].rank, seen[2].part) == (2, "forward")
    assert seen[2].ratio == pytest.approx(1.4)
    assert seen[2].values() == {"perf/slowest_rank": 2.0, "perf/slowest_ratio": seen[2].ratio}


def test_another_rank_each_time_is_no_straggler():
    turns = [forward(*(6.0 if rank == turn % 3 else 4.0 for rank in range(3))) for turn in range(9)]
    assert observe_all(turns) == [None] * 9


def test_of_two_ranks_the_faster_one_is_the_measure():
    found = observe_all([forward(4.0, 5.6)] * SLOW_INTERVALS)[-1]
    assert (found.rank, found.ratio) == (1, pytest.approx(1.4))


def test_a_difference_that_costs_next_to_nothing_is_not_worth_a_word():
    assert observe_all([forward(0.1, 0.3)] * 5) == [None] * 5
    assert observe_all([forward(4.0, 4.7)] * 5) == [None] * 5  # 1.18 of the median
    assert observe_all([forward(4.0)] * 5) == [None] * 5  # alone


def test_the_part_that_makes_the_difference_is_named():
    own = [{"forward": 4.0, "data": 0.1}, {"forward": 4.1, "data": 3.0}, {"forward": 4.2, "data": 0.0}]
    found = observe_all([own] * SLOW_INTERVALS)[-1]
    assert (found.rank, found.part) == (1, "data")
