import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest

from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import temporary_beside
from ecar_dist.storage.node_lock import node_lock, owned_temporary, sweep_temporaries

FORK = multiprocessing.get_context("fork")


def hold(path, held):
    with node_lock(path, threading.Event()):
        held.set()
        time.sleep(60)


def count_alone(path, counter, rounds):
    """The update is not atomic: two workers at the same time would lose a count."""
    for _ in range(rounds):
        with node_lock(path, threading.Event()):
            value = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(value + 1))


def test_one_at_a_time_and_nothing_left(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    workers = [FORK.Process(target=count_alone, args=(tmp_path / "lock", counter, 10)) for _ in range(3)]
    workers += [threading.Thread(target=count_alone, args=(tmp_path / "lock", counter, 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert counter.read_text() == "50"
    assert os.listdir(tmp_path) == ["counter"]


def test_a_killed_holder_frees_it(tmp_path):
    held = FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with node_lock(tmp_path / "lock", threading.Event()):
        pass


def test_a_lock_file_removed_before_it_was_locked_is_not_the_lock(tmp_path, monkeypatch):
    flock, removals = fcntl.flock, iter([True, False, False])

    def lose_and_lock(handle, operation):
        if next(removals):
            (tmp_path / "lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", lose_and_lock)
    with node_lock(tmp_path / "lock", threading.Event()):
        assert (tmp_path / "lock").exists(), "a second process would create and lock a new file"


def test_waiting_ends_when_told(tmp_path):
    stopping, held = threading.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path / "lock", held), daemon=True)
    holder.start()
    assert held.wait(60)
    threading.Timer(0.1, stopping.set).start()
    with pytest.raises(DataError, match=str(tmp_path / "lock")), node_lock(tmp_path / "lock", stopping):
        pass
    holder.kill()


def test_a_file_system_without_locks_is_refused_with_a_fix(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    temporary_beside(tmp_path / "a.tar").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=str(tmp_path / "lock")), node_lock(tmp_path / "lock", threading.Event()):
        pass
    with pytest.raises(DataError, match=str(tmp_path)):
        sweep_temporaries(tmp_path)


def test_a_lock_file_that_cannot_be_made_is_the_disks_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), node_lock(tmp_path / "file/lock", threading.Event()):
        pass


def test_temporaries_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    dead = temporary_beside(tmp_path / "a.tar")
    dead.write_bytes(b"left")
    elsewhere = tmp_path / ".a.tar.another-host.1.abcd.tmp"
    elsewhere.write_bytes(b"left")
    with owned_temporary(tmp_path / "a.tar") as (living, _):
        sweep_temporaries(tmp_path)
        assert {living, elsewhere} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == [elsewhere]
