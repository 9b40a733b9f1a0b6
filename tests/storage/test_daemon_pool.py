import subprocess
import sys
import threading
import time
import weakref

import pytest

from ecar_dist.storage.daemon_pool import DaemonPool


def test_results_and_errors_come_back():
    pool = DaemonPool(2, "test")
    assert pool.submit(divmod, 7, 2).result(60) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 7, 0).result(60)
    pool.end()


def test_first_come_first_served():
    pool, order = DaemonPool(1, "test"), []
    futures = [pool.submit(order.append, number) for number in range(20)]
    for future in futures:
        future.result(60)
    assert order == list(range(20))
    pool.end()


def test_a_map_keeps_the_order():
    with DaemonPool(4, "test") as pool:
        assert list(pool.map(lambda number: time.sleep(0.01 * (number % 3)) or number, range(20))) == list(range(20))
        results = pool.map(lambda number: 6 // number, (3, 0))
        assert next(results) == 2
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_the_end_of_a_block_waits_a_moment_for_what_runs():
    done, running = [], threading.Event()
    with DaemonPool(1, "test") as pool:
        pool.submit(lambda: running.set() or time.sleep(0.2) or done.append(1))
        assert running.wait(60)
    assert done == [1]
    stuck, began = threading.Event(), time.monotonic()
    running.clear()
    with DaemonPool(1, "test") as pool:
        pool.submit(lambda: running.set() or stuck.wait(60))
        assert running.wait(60)
    assert time.monotonic() - began < 20
    stuck.set()


def test_the_end_cancels_what_waits_and_does_not_wait_for_what_runs():
    pool, running, go = DaemonPool(1, "test"), threading.Event(), threading.Event()

    def work():
        running.set()
        return go.wait(60)

    first, second = pool.submit(work), pool.submit(work)
    assert running.wait(60)
    pool.end()
    pool.end()
    assert second.cancelled()
    assert pool.submit(work).cancelled()
    assert not first.done()
    go.set()
    assert first.result(60)


def test_the_program_does_not_wait():
    script = """
import time
import weakref
from ecar_dist.storage.daemon_pool import DaemonPool
pool = DaemonPool(1, "test")
for _ in range(2):
    pool.submit(time.sleep, 60)
time.sleep(0.1)
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)
    assert time.monotonic() - began < 20


def test_a_waiting_thread_does_not_keep_the_last_result():
    class Result:
        pass

    pool = DaemonPool(1, "test")
    result = weakref.ref(pool.submit(Result).result(60))
    deadline = time.monotonic() + 60
    while result() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert result() is None
    pool.end()
