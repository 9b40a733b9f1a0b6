"""The clock of the phases, on a clock of our own."""

import time

import pytest
import torch

from ecar_dist.runtime.watchdog.heartbeat import PHASES
from ecar_dist.train.phases import ForwardClock, Phases


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_time_counts_for_the_phase_it_was_spent_in_and_every_change_is_a_beat():
    beats, clock = [], Clock()
    phases = Phases(lambda name, step: beats.append((name, step)), clock)
    for name, step, seconds in (("load", 0, 3.0), ("data", 1, 1.0), ("forward", 1, 0.5), ("data", 2, 2.0)):
        clock.now += seconds  # spent in the phase before
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
    assert phases.totals() == totals  # asking changes nothing
    assert beats == [("start", 0), ("load", 0), ("data", 1), ("forward", 1), ("data", 2)]


def test_a_phase_that_does_not_exist_is_a_mistake():
    phases = Phases(lambda name, step: None)
    with pytest.raises(KeyError):
        phases.enter("forwards", 1)


def test_the_forward_clock_counts_what_is_inside_and_begins_anew_when_taken():
    clock = ForwardClock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            time.sleep(0.02)
        time.sleep(0.03)
    assert 0.04 <= clock.take() < 0.06
    assert clock.take() == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_device_that_is_measured():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    clock = ForwardClock(device)
    (matrix @ matrix).sum().item()
    began = time.perf_counter()
    with clock:
        for _ in range(50):
            matrix @ matrix
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    waited = time.perf_counter() - began
    seconds = clock.take()
    assert launched < 0.5 * seconds  # the host was long done
    assert 0.5 * waited < seconds <= 1.05 * waited
    assert clock.take() == 0.0
