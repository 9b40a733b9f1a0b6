"""Where the time of a run goes: phases, goodput, the bottleneck, and what makes a rank slow."""

from types import SimpleNamespace

import pytest

from ecar_dist.runtime.watchdog.heartbeat import PHASES
from ecar_dist.train.time_budget import SLOW_INTERVALS, Goodput, Phases, SlowRank, Stragglers, TimeBudget, run_began

COMPUTE = {"forward": 4.0, "backward": 4.0, "optimizer": 1.0, "data": 0.5, "checkpoint": 0.2, "log": 0.1}


@pytest.mark.parametrize(
    ("changes", "kind", "number"),
    [
        ({}, "compute-bound", ""),
        ({"data_wait": 4.1}, "data-bound", " 41%"),
        ({"data_wait": 0.99}, "compute-bound", ""),
        ({"data_wait": 25.0}, "data-bound", " 100%"),
        ({"phases": {**COMPUTE, "checkpoint": 1.2}}, "checkpoint-bound", " 12%"),
        ({"phases": {**COMPUTE, "checkpoint": 0.4}}, "compute-bound", ""),
        ({"phases": {**COMPUTE, "checkpoint": 1.2}, "data_wait": 2.0}, "data-bound", " 20%"),
        ({"phases": {**COMPUTE, "preview": 3.0}}, "preview-bound", " 30%"),
        ({"phases": {**COMPUTE, "log": 2.0}}, "log-bound", " 20%"),
        ({"slow": SlowRank(3, 1.42, "forward"), "data_wait": 5.0}, "rank 3", " 1.4x"),
    ],
)
def test_the_bottleneck_is_what_to_improve_first(changes, kind, number):
    budget = TimeBudget(**{"elapsed": 10.0, "phases": COMPUTE, **changes})
    assert budget.kind() == kind
    assert budget.bottleneck().startswith(kind)
    assert number in budget.bottleneck()


def test_shares_are_of_the_interval():
    shares = TimeBudget(20.0, COMPUTE).shares()
    assert shares["forward"] == 0.2
    assert sum(shares.values()) == pytest.approx(9.8 / 20)
    assert TimeBudget(0.0, COMPUTE).shares()["forward"] == 0.0  # an interval without time


def test_only_another_kind_of_bottleneck_is_news():
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


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_time_counts_for_the_phase_it_was_spent_in_and_every_change_is_a_beat():
    beats, clock = [], Clock()
    phases = Phases(lambda name, step: beats.append((name, step)), clock)
    for name, step, seconds in (("load", 0, 3.0), ("data", 1, 1.0), ("forward", 1, 0.5), ("data", 2, 2.0)):
        clock.now += seconds  # spent in the previous phase
        phases.enter(name, step)
    clock.now += 4.0
    totals = phases.totals()
    assert {name: seconds for name, seconds in totals.items() if seconds} == {
        "start": 3.0,
        "load": 1.0,
        "data": 0.5 + 4.0,
        "forward": 2.0,
    }
    assert sum(totals.values()) == clock.now - 100.0
    assert list(totals) == list(PHASES)
    assert phases.totals() == totals  # reading changes nothing
    assert beats == [("start", 0), ("load", 0), ("data", 1), ("forward", 1), ("data", 2)]


def test_a_phase_that_does_not_exist_is_a_mistake():
    phases = Phases(lambda name, step: None)
    with pytest.raises(KeyError):
        phases.enter("forwards", 1)


def test_only_steps_that_moved_the_weights_and_were_kept_count():
    goodput = Goodput()
    goodput.end_step(3.0, applied=True)
    goodput.end_step(5.0, applied=False)  # refused
    goodput.end_step(6.5, applied=True)
    assert goodput.state_dict() == {"kept_seconds": 4.5}
    saved = goodput.state_dict()
    goodput.end_step(10.0, applied=True)
    goodput.load_state_dict(saved)  # rolled back: the last step is lost
    goodput.end_step(11.0, applied=True)
    assert goodput.state_dict() == {"kept_seconds": 5.5}


def test_a_new_attempt_goes_on_from_its_checkpoint_and_its_own_start(monkeypatch):
    monkeypatch.setattr("ecar_dist.train.time_budget.time", SimpleNamespace(time=lambda: 1000.0))
    assert Goodput().values() == {}  # on a rank that does not know when the run began
    goodput = Goodput(1000.0 - 100.0)
    goodput.load_state_dict({"kept_seconds": 40.0})
    goodput.end_step(10.0, applied=True)
    assert goodput.values()["perf/goodput"] == 0.5


def test_the_run_began_with_its_first_attempt():
    attempts = [{"started": "2026-01-02T03:04:05+00:00"}, {"started": "2026-02-02T03:04:05+00:00"}]
    assert run_began(attempts) == 1767323045.0
