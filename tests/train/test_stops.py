"""SIGTERM and SIGUSR1 wherever they reach a rank: it ends soon, with one complete checkpoint and status 75.

The bound is one step, the save under way and one save; here each of them takes far less than a second. A launcher under
Slurm allows 30 s by default.
"""

import re
from signal import SIGTERM, SIGUSR1

from tests.conftest import losses, read_metrics
from tests.train.struck_ranks import REQUEUE


def test_before_the_first_step_nothing_is_saved(run):
    assert run.stop_at("data.take:step=1").statuses == [REQUEUE, REQUEUE]  # the loop has begun, no step has
    assert run.steps_saved() == []
    assert run.last_end() == "signal"


def test_a_run_that_is_stopped_again_and_again_is_the_undisturbed_one(run, undisturbed):
    # In a step: both ranks finish the step in which one was struck, and begin no other.
    ended = run.stop_at("train.step:step=2", struck=[1], signals=[SIGUSR1, SIGTERM, SIGUSR1])
    assert ended.statuses == [REQUEUE, REQUEUE]
    assert run.steps_saved() == [2]
    assert re.search(r"stopped .* at step 2\b", ended.text)

    # While loading: nothing changes.
    ended = run.stop_at("load.read")
    assert ended.statuses == [REQUEUE, REQUEUE]
    assert run.steps_saved() == [2]
    assert run.last_end() == "signal"

    # While loading, one rank only: the other cannot be asked, and ends because this one is gone.
    ended = run.stop_at("load.read", struck=[1])
    assert ended.statuses[1] == REQUEUE
    assert ended.statuses[0] != 0
    assert run.steps_saved() == [2]

    # In the last step: too late to stop anything.
    ended = run.stop_at("train.step:step=10", signals=[SIGUSR1])
    assert ended.statuses == [0, 0]
    assert losses(read_metrics(run.config)) == undisturbed[1]
    assert [line["step"] for line in read_metrics(run.config)] == list(range(1, 11))
    assert run.last_end() == "done"


def test_in_a_save_that_save_stands_and_later_steps_have_their_own(run):
    ended = run.stop_at("checkpoint.write:step=4", signals=[SIGUSR1])
    assert ended.statuses == [REQUEUE, REQUEUE]
    saved = run.steps_saved()
    assert saved[0] == 4  # the save that was under way
    assert len(saved) <= 2
    assert saved[-1] == read_metrics(run.config)[-1]["step"]
    assert run.last_end() == "signal"
