import threading
import time

import pytest
import torch
import torch.distributed as dist

from ecar_dist.runtime.world import _POLLS_A_SECOND, Placement, RemoteError, World


class PretendWorld(World):
    """Rank `rank` of ranks whose errors are known."""

    def __init__(self, rank, errors):
        self.rank, self.size, self._errors = rank, len(errors), errors

    def gather(self, value):
        return [error and str(error) for error in self._errors]


def test_the_first_failing_rank_says_why_and_the_others_say_nothing():
    errors = [None, ValueError("one"), ValueError("two")]
    raised = []
    for rank, error in enumerate(errors):
        with pytest.raises((ValueError, RemoteError)) as caught:
            PretendWorld(rank, errors).agree(error)
        raised.append(type(caught.value))
    assert raised == [RemoteError, ValueError, RemoteError]
    PretendWorld(0, [None, None]).agree(None)


def test_an_error_without_a_message_is_an_error():
    with pytest.raises(RemoteError):
        PretendWorld(0, [None, ValueError()]).agree(None)


def test_together_gives_the_value_or_the_error():
    world = World(Placement(), torch.device("cpu"))
    assert world.together(lambda: 3) == world.on_first_rank(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        world.together(lambda: (_ for _ in ()).throw(ValueError("mine")).__next__())
    with pytest.raises(RemoteError):
        PretendWorld(0, [None, ValueError("theirs")]).together(lambda: 3)


def in_threads(*actions):
    """Run each in a thread; what they returned or raised."""
    found = [None] * len(actions)

    def run(index):
        try:
            found[index] = actions[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def worlds(size):
    """The worlds of ranks that have met, without a process group."""
    store = dist.HashStore()
    return [World(Placement(rank, size), torch.device("cpu"), store) for rank in range(size)]


def test_a_roll_call_gives_all_ranks_what_the_first_decides_on_all_texts():
    made = worlds(3)
    decisions = in_threads(*(lambda w=w: w.roll_call("names", f"I am {w.rank}", 30, " | ".join) for w in made))
    assert decisions == ["I am 0 | I am 1 | I am 2"] * 3


class CountedStore:
    """A store that counts its requests."""

    def __init__(self):
        self.requests, self._store, self._lock = 0, dist.HashStore(), threading.Lock()

    def __getattr__(self, name):
        with self._lock:
            self.requests += 1
        return getattr(self._store, name)


def test_a_thousand_ranks_meet():
    """With a bounded number of requests for each, even if the last rank arrives late."""
    size, store = 1024, CountedStore()
    made = [World(Placement(rank, size), torch.device("cpu"), store) for rank in range(size)]

    def call(world):
        if world.rank == size - 1:
            time.sleep(1.5)
        return world.roll_call("names", str(world.rank), 60, lambda texts: str(sum(map(int, texts))))

    before, began = threading.stack_size(1 << 18), time.monotonic()
    try:
        decisions = in_threads(*(lambda w=w: call(w) for w in made))
    finally:
        threading.stack_size(before)
    assert decisions == [str(size * (size - 1) // 2)] * size
    polls = (time.monotonic() - began) * _POLLS_A_SECOND / size  # of one rank, after its first, quick ones
    assert store.requests < (20 + polls) * size


def test_a_roll_call_has_a_time_limit(monkeypatch):
    first, second, _ = worlds(3)

    def call_first():
        while not first._store.check(["names/answer/1"]):
            time.sleep(0.01)
        return first.roll_call("names", "I am 0", 0.2, repr)

    said = in_threads(call_first, lambda: second.roll_call("names", "I am 1", 0.2, repr))
    assert said == ["['I am 0', 'I am 1', None]"] * 2
    monkeypatch.setattr("ecar_dist.runtime.world._DECISION_SECONDS", 0.2)
    _, second, _ = worlds(3)
    with pytest.raises(RemoteError, match=r"rank 0 .*0\.4 s") as caught:
        second.roll_call("names", "I am 1", 0.2, repr)
    assert caught.value.again
