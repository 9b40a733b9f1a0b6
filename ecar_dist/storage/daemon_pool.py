"""A pool of daemon threads: the program's end does not wait for what they still have to do.

concurrent.futures' own pool finishes its whole queue before the interpreter may exit, here minutes of downloads that
nobody will read.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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

    def end(self) -> None:
        """Cancel what waits; the threads end with what they are doing now, and nobody waits for them."""
        with self._lock:
            self._ended = True
            while not self._queue.empty():
                with contextlib.suppress(queue.Empty):  # a thread was faster
                    if (task := self._queue.get_nowait()) is not None:
                        task.future.cancel()
            for _ in self._threads:
                self._queue.put(None)

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
