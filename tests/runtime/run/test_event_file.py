"""TensorBoard files under faults, read back by TensorBoard's own reader."""

import errno
import itertools
import os
import threading
import time
from functools import partial

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import summary

import ecar_dist.runtime.run.event_file as module
from ecar_dist.runtime.run.event_file import EventFile


def scalar(value, tag="x"):
    return partial(summary.scalar, tag, value)


def points(folder, tag="x"):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def tags(folder):
    """The tags of the scalars that have reached the disk."""
    if not folder.exists() or not list(folder.iterdir()):
        return []
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()["scalars"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def write(folder, steps, purge_step=None):
    board = EventFile(folder, purge_step)
    for step in steps:
        board.add(step, scalar(float(step)))
    board.close()
    return board


def test_what_is_added_is_read_back(tmp_path):
    board = write(tmp_path, range(300))
    assert points(tmp_path) == [(step, float(step)) for step in range(300)]
    assert board.dropped == 0
    board.close()


def test_a_resume_hides_the_steps_that_are_repeated(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(5, 7), purge_step=5)
    assert [step for step, _ in points(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_is_hidden_stays_hidden_though_no_event_came_after_it(tmp_path):
    write(tmp_path, range(1, 9))
    cut_short = EventFile(tmp_path, purge_step=5)
    wait_for(lambda: len(points(tmp_path)) == 4)
    write(tmp_path, [12], purge_step=10)
    assert [step for step, _ in points(tmp_path)] == [1, 2, 3, 4, 12]
    cut_short.close()


def test_a_torn_file_of_an_earlier_attempt_does_not_hide_the_next(tmp_path):
    write(tmp_path, range(1, 4))
    (torn,) = tmp_path.iterdir()
    torn.write_bytes(torn.read_bytes()[:-5])
    torn.rename(tmp_path / "events.out.tfevents.1000000000.host.1.0")
    write(tmp_path, range(3, 6), purge_step=3)
    assert [step for step, _ in points(tmp_path)] == [1, 2, 3, 4, 5]


def test_after_an_error_events_are_dropped_and_counted_until_a_new_file_begins(tmp_path, monkeypatch, capfd):
    whole, faults = module._write_all, []

    def write_all(file, data):
        if faults:
            whole(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(file, data)

    monkeypatch.setattr(module, "_write_all", write_all)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(module, "_numbers", itertools.count(9))  # readers sort files by name: 9 comes before 10
    board = EventFile(tmp_path)
    board.add(1, scalar(1.0))
    wait_for(lambda: tags(tmp_path))
    faults.append("full")
    for step in (2, 3):
        board.add(step, scalar(1.0))
        wait_for(lambda step=step: board.dropped == step - 1)
    faults.clear()
    time.sleep(0.25)
    board.add(4, scalar(1.0))
    board.close()
    assert [step for step, _ in points(tmp_path)] == [1, 4]
    assert board.dropped == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in said


def test_a_folder_that_cannot_be_made_costs_only_the_events(tmp_path, capfd):
    (tmp_path / "tb").write_text("a file")
    board = write(tmp_path / "tb", range(5))
    assert board.dropped == 5
    assert capfd.readouterr().err.count("TensorBoard") == 1


def test_a_slow_folder_does_not_block_training(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "QUEUED", 10)
    reached, go_on, board = threading.Event(), threading.Event(), EventFile(tmp_path)
    try:
        board.add(0, lambda: (reached.set(), go_on.wait(60)) and summary.scalar("x", 0.0))
        assert reached.wait(60)  # an empty queue is not enough: the thread may still take what comes next
        began = time.perf_counter()
        for step in range(1, 1001):
            board.add(step, scalar(1.0))
        assert time.perf_counter() - began < 20
        assert board.dropped == 990
        began = time.perf_counter()
        board.close(patience=0.1)
        assert time.perf_counter() - began < 20
        assert capfd.readouterr().err.count(str(tmp_path)) == 1
    finally:
        go_on.set()
        board.close()


@pytest.mark.parametrize("count", [1, 500])
def test_events_that_come_together_are_one_write(tmp_path, monkeypatch, count):
    writes, whole = [], module._write_all
    monkeypatch.setattr(module, "_write_all", lambda file, data: (writes.append(len(data)), whole(file, data)))
    reached, held = threading.Event(), threading.Event()
    board = EventFile(tmp_path)
    board.add(0, lambda: (reached.set(), held.wait(60)) and summary.scalar("x", 0.0))
    assert reached.wait(60)
    for step in range(1, count + 1):
        board.add(step, scalar(1.0))
    held.set()
    board.close()
    assert len(points(tmp_path)) == count + 1
    assert len(writes) <= 3  # the header, the event that was held up, the rest
