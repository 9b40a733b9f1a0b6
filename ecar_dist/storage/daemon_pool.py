"""A pool of daemon threads: the program's end does not wait for what they still have to do.

concurrent.futures' own pool finishes its whole queue before the interpreter may exit, here minutes of downloads that
nobody will read.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

PATIENCE = 2.0  # seconds: most of what runs is done by then, and leaves no file half-made

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")
_END = object()


class DaemonPool:
    """Runs what is submitted, first come first served."""

    def __init__(self, threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of _ended
        self._ended = False
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
        """After the end, a future that is cancelled."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended:
                future.cancel()
            self._queue.put(_Task(future, lambda: run(*args, **options)))
        return future

    def map(self, run: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """The results in the order of the items, all of which are submitted now."""
        futures = [self.submit(run, item) for item in items]
        return (future.result() for future in futures)

    def one_ahead(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; while one is used, the pool makes the next."""
        pending = self.submit(next, items, _END)
        while (item := pending.result()) is not _END:
            pending = self.submit(next, items, _END)
            yield cast(Item, item)

    def end(self, patience: float = 0.0) -> None:
        """Cancel what waits; what runs gets so many seconds, and then nobody waits for it any longer."""
        with self._lock:
            self._ended = True
            while not self._queue.empty():
                with contextlib.suppress(queue.Empty):  # a thread was faster
                    if (task := self._queue.get_nowait()) is not None:
                        task.future.cancel()
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
            task.run()


class _Task(Generic[T]):
    def __init__(self, future: Future[T], call: Callable[[], T]) -> None:
        self.future, self._call = future, call

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._call()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
