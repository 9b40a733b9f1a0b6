import os
import signal
import subprocess
import sys
import time

import pytest

from ecar_dist.runtime.signals import BURST_SECONDS, STOP_SIGNALS, StoppedEarlyError, StopRequest
from ecar_dist.runtime.watchdog.watched import process_state

CHILD = "import time; from ecar_dist.runtime.signals import die_with_parent;die_with_parent(); print(1); time.sleep(60)"
PARENT = (
    "import subprocess, sys;"
    "child = subprocess.Popen([sys.executable, '-u', '-c', sys.argv[1]], stdout=subprocess.PIPE);"
    "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
)


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_training_a_signal_ends_the_process_at_once(stop, number):
    with pytest.raises(StoppedEarlyError, match=f"{number.name} before the first step"):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_in_training_a_signal_only_sets_the_flag(stop, number):
    stop.defer()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    assert stop.received is number


def test_after_the_last_step_a_signal_stops_nothing(stop):
    stop.defer()
    os.kill(os.getpid(), signal.SIGUSR1)
    stop.mark_complete()
    assert not stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stop


def test_only_a_second_interrupt_ends_the_run_at_once(stop):
    stop.defer()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.received is signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_burst_of_signals_before_training_is_one(stop):
    with pytest.raises(StoppedEarlyError, match="SIGTERM before the first step"):
        os.kill(os.getpid(), signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)  # while the first is still being handled
    stop._ends_since -= BURST_SECONDS + 1  # some code has swallowed the error
    with pytest.raises(StoppedEarlyError):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_rank_dies_with_its_launcher():
    launcher = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    rank = int(launcher.stdout.readline())
    assert process_state(rank) not in ("", "Z")
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    until = time.monotonic() + 5
    while process_state(rank) not in ("", "Z") and time.monotonic() < until:
        time.sleep(0.05)
    assert process_state(rank) in ("", "Z")
