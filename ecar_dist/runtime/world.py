"""Which process this is, and the few collectives that the rest of the code needs.

`start/rendezvous.py` makes a World; only that module and this one import torch.distributed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import Placement, node_name

T = TypeVar("T")
_DECISION_SECONDS = 30.0  # for rank 0's decision, once its wait for the answers is over
_HEARD_SECONDS = 10.0  # for the others to read it
_LONGEST_POLL = 0.25  # seconds between polls, for up to _POLLS_A_SECOND / 4 ranks
_POLLS_A_SECOND = 2000  # of all ranks together: rank 0's store answers in one thread


class World:
    """All ranks of the run. With one process every collective is the identity."""

    def __init__(self, placement: Placement, device: torch.device, store: dist.Store | None = None) -> None:
        # Where this process is.
        self.rank = placement.rank
        self.size = placement.size
        self.local_rank = placement.local_rank
        self.device = device

        # Where the others are: ranks of a node are consecutive.
        first = placement.rank - placement.local_rank
        self.node_ranks = tuple(range(first, min(first + placement.local_size, placement.size)))
        self.nodes = (node_name(),) * placement.size  # by rank; the rendezvous sets the true names
        self.met = time.time()  # when all ranks had joined, by the clock of this node; the rendezvous sets it
        self._store = store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, in place, the same on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over ranks, in place, the same on all of them."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def tensor(self, values: Sequence[float]) -> torch.Tensor:
        """Numbers of the host as float64 [n] on this rank's device. The host does not wait for the device."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.device.type == "cpu":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)

    def of_each(self, values: torch.Tensor) -> list[list[int]]:
        """The int64 [n] of every rank, by rank, on all ranks: one sum over ranks, one read from the device."""
        rows = torch.zeros(self.size, len(values), dtype=torch.int64, device=self.device)
        rows[self.rank] = values
        return self.sum(rows).tolist()

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value of every rank, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """One picklable value of every rank, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def roll_call(self, name: str, text: str, seconds: float, decide: Callable[[Sequence[str | None]], str]) -> str:
        """Rank 0's decision, based on the `text` of every rank, on all ranks.

        `decide` receives None for a rank that was silent for `seconds`. Every call needs a new `name`. The texts go
        through the store instead of a collective, so the call ends in time even if a rank hangs, and works before there
        is a process group. Raises RemoteError if rank 0 is silent or gone.
        """
        if self.size == 1:
            return decide([text])
        assert self._store is not None, "this world has no store"

        # Every rank answers; rank 0 reads the answers and decides, the others wait for its decision.
        try:
            self._store.set(f"{name}/answer/{self.rank}", text)
            return self._decide_for_all(name, seconds, decide) if self.is_first else self._hear_decision(name, seconds)
        except dist.DistError as error:
            raise RemoteError("rank 0 is gone", again=True) from error

    def _decide_for_all(self, name: str, seconds: float, decide: Callable[[Sequence[str | None]], str]) -> str:
        assert self._store is not None

        # the ranks that have answered by then
        answers = [f"{name}/answer/{rank}" for rank in range(self.size)]
        all_came = _await_keys(self._store, answers, seconds)
        came = [all_came or self._store.check([key]) for key in answers]
        found = iter(self._store.multi_get([key for key, here in zip(answers, came, strict=True) if here]))
        texts = [next(found).decode() if here else None for here in came]

        # The store is part of this process, which may end now: wait until the ranks that answered have read it.
        decision = decide(texts)
        self._store.set(f"{name}/decision", decision)
        others = [f"{name}/heard/{rank}" for rank in range(1, self.size) if came[rank]]
        _await_keys(self._store, others, _HEARD_SECONDS)
        return decision

    def _hear_decision(self, name: str, seconds: float) -> str:
        assert self._store is not None
        limit = seconds + _DECISION_SECONDS
        if not _await_keys(self._store, [f"{name}/decision"], limit, ranks=self.size):
            raise RemoteError(f"rank 0 did not decide within {limit:g} s", again=True)
        decision = self._store.get(f"{name}/decision").decode()
        self._store.set(f"{name}/heard/{self.rank}", "")
        return decision

    def all_reduce_seconds(self, nbytes: int, repeats: int) -> float:
        """Mean seconds of one all-reduce of `nbytes`, after a first one that opens connections."""
        # The first one opens connections.
        values = torch.zeros(nbytes // 4, device=self.device)
        self.sum(values)
        self._finish()

        began = time.perf_counter()
        for _ in range(repeats):
            self.sum(values)
        self._finish()
        return (time.perf_counter() - began) / repeats

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error: the first such rank raises its own, all others RemoteError."""
        # One error is reported in full, by the rank that raised it; the others only name that rank.
        failed = [rank for rank, message in enumerate(self.gather(error and str(error))) if message is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise RemoteError(f"rank {failed[0]} met an error and reports it")

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises on any, all ranks raise (see `agree`)."""
        value = None
        error = None
        try:
            value = action()
        except Exception as failure:
            error = failure
        self.agree(error)
        return cast(T, value)

    def on_first_rank(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 and return its value there, None elsewhere; its error is an error on every rank."""
        return self.together(lambda: action() if self.is_first else None)


def _await_keys(store: dist.Store, keys: Sequence[str], seconds: float, ranks: int = 1) -> bool:
    """Whether all keys were set in time. `ranks`: how many ranks wait at the same time.

    Polls, because `store.wait` blocks signals, and fills stderr when it times out.
    """
    longest = max(_LONGEST_POLL, ranks / _POLLS_A_SECOND)
    until = time.monotonic() + seconds
    pause = 0.005
    while not store.check(list(keys)):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(longest, 1.5 * pause)
    return True
