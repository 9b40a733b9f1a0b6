"""A pool of daemon threads: the program exits without waiting for their remaining work.

The pool of concurrent.futures finishes its entire queue before the interpreter can exit. In a script or a notebook that
does not end through `cli.entry`, these can be minutes of downloads that nobody will read.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

PATIENCE = 2.0  # seconds: most running calls end within this time, and leave no half-written file

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")
_END = object()


class DaemonPool:
    """Runs the submitted calls, first come, first served."""

    def __init__(self, threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _ended
        self._ended = False
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
        """Queue a call; returns its future. After the end of the pool, the future is cancelled."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended:
                future.cancel()
            self._queue.put((future, lambda: run(*args, **options)))
        return future

    def map(self, run: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """The results in the order of the items. All items are submitted immediately."""
        futures = [self.submit(run, item) for item in items]
        return (future.result() for future in futures)

    def errors_of(self, run: Callable[[Item], object], items: Iterable[Item]) -> list[Exception]:
        """Call `run` for each item and wait for all; returns the errors. After an error, no other item is started."""
        failed = threading.Event()

        def attempt(item: Item) -> Exception | None:
            if not failed.is_set():
                try:
                    run(item)
                except Exception as error:
                    failed.set()
                    return error
            return None

        return [error for error in self.map(attempt, items) if error is not None]

    def one_ahead(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items. While the caller uses one, the pool produces the next."""
        pending = self.submit(next, items, _END)
        while (item := pending.result()) is not _END:
            pending = self.submit(next, items, _END)
            yield cast(Item, item)

    def end(self, patience: float = 0.0) -> None:
        """Cancel the queued calls, and wait up to `patience` seconds for the running ones."""
        with self._lock:
            self._ended = True
            while not self._queue.empty():
                with contextlib.suppress(queue.Empty):  # a thread took the task first
                    if (task := self._queue.get_nowait()) is not None:
                        task[0].cancel()
            for _ in self._threads:
                self._queue.put(None)

        deadline = time.monotonic() + patience
        for thread in self._threads if patience else ():
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> DaemonPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(PATIENCE)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            _run(*task)
            task = None  # a waiting thread must not keep its last result in memory, such as the map of a shard


def _run(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
