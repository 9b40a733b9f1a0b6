import time

import pytest

from ecar_dist.train.goodput import Goodput, began


def test_only_steps_that_moved_the_weights_and_were_kept_count():
    goodput = Goodput()
    goodput.end_step(3.0, applied=True)
    goodput.end_step(5.0, applied=False)  # refused
    goodput.end_step(6.5, applied=True)
    assert goodput.notes() == {"kept_seconds": 4.5}
    saved = goodput.notes()
    goodput.end_step(10.0, applied=True)
    goodput.resume(saved)  # rolled back: the last step is lost
    goodput.end_step(11.0, applied=True)
    assert goodput.notes() == {"kept_seconds": 5.5}


def test_a_new_attempt_goes_on_from_its_checkpoint_and_its_own_start():
    goodput = Goodput({"kept_seconds": 40.0})
    goodput.end_step(10.0, applied=True)
    assert goodput.values() == {}  # nobody said when the run began
    goodput.run_began = time.time() - 100.0
    assert goodput.values()["perf/goodput"] == pytest.approx(0.5, abs=0.01)


def test_the_run_began_with_its_first_attempt():
    attempts = [{"started": "2026-01-02T03:04:05+00:00"}, {"started": "2026-02-02T03:04:05+00:00"}]
    assert began(attempts) == 1767323045.0
