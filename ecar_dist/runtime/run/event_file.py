"""TensorBoard event files that training never waits for. Code for a single process.

torch's SummaryWriter blocks its caller when its queue is full, and raises in the caller when the disk is full. Even in
a thread of our own it would open, append to and close the file for every event, and its own thread would die with a
traceback on stderr and an unknown number of lost events. Here, events that cannot be written are dropped and counted;
metrics.jsonl has the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

QUEUED = 10_000  # events that may wait to be written, some MiB
RETRY_SECONDS = 60.0  # from a failed write to the next new file
PATIENCE = 10.0  # seconds that `close` waits for what is queued

_numbers = itertools.count()

Make = Callable[[], Any]  # -> a Summary protocol buffer


class EventFile:
    """Writes summaries to a folder from a thread of its own.

    After an error it continues in a new file: readers stop at a torn record, and continue with the next file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None, dropped: int = 0) -> None:
        """purge_step: readers hide all older events of the folder from this step on. dropped: the initial count."""
        # Imported here, because two threads that import parts of one package at the same time may each see half of it.
        import torch.utils.tensorboard.summary  # noqa: F401

        self.dropped = dropped
        self._said = False
        self._lock = threading.Lock()  # guards dropped and _said
        self._folder = folder
        self._purge_step = purge_step
        self._file: BinaryIO | None = None
        self._failed_at = -RETRY_SECONDS
        self._queue: queue.Queue[tuple[int, float, Make] | None] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._work, name="event-file", daemon=True)
        self._thread.start()

    def add(self, step: int, make: Make) -> None:
        """Queue the summary that `make` will build, in the writing thread. Returns at once, whatever the disk does."""
        try:
            self._queue.put_nowait((step, time.time(), make))
        except queue.Full:
            self._drop(1, f"{self._folder} is too slow")

    def close(self, patience: float = PATIENCE) -> None:
        """Write what is queued, for at most `patience` seconds. Safe to call twice."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=patience)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._drop(self._queue.qsize(), f"{self._folder} is too slow")

    def _work(self) -> None:
        ended = False
        if self._purge_step is not None:
            self._write([])  # what is hidden stays hidden, even if the process dies before the first event
        while not ended:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            ended = None in batch
            self._write([item for item in batch if item is not None])
        if self._file:
            self._file.close()

    def _write(self, batch: list[tuple[int, float, Make]]) -> None:
        """One write for the whole batch: on a network drive each write costs a round trip."""
        if time.monotonic() - self._failed_at < RETRY_SECONDS:
            self._drop(len(batch))
            return
        try:
            records = b"".join(_record(summary=make(), step=step, wall_time=at) for step, at, make in batch)
            if self._file is None:
                self._file = self._begin()
            _write_all(self._file, records)
        except Exception as error:  # no error here is worth ending a run
            self._failed_at = time.monotonic()
            self._file = None
            self._drop(len(batch), str(error))

    def _begin(self) -> BinaryIO:
        """A new file with its header. Its name sorts after those of older files: readers take files in this order."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}"
        head = _record(file_version="brain.Event:2", wall_time=time.time())
        if self._purge_step is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            head += _record(
                session_log=SessionLog(status=SessionLog.START), step=self._purge_step, wall_time=time.time()
            )
        file = open(self._folder / name, "xb", buffering=0)  # noqa: SIM115 - open until the end, or an error
        _write_all(file, head)
        self._purge_step = None  # once: a later file continues where this one ended
        return file

    def _drop(self, count: int, why: str = "") -> None:
        with self._lock:
            self.dropped += count
            is_first = bool(why) and not self._said
            self._said = self._said or bool(why)
        if is_first:
            print(
                f"ecar-dist: TensorBoard events are dropped ({why}); training continues, metrics.jsonl has the numbers",
                file=sys.stderr,
                flush=True,
            )


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Unbuffered: after an error the file has a torn end, and nothing is written after it later."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _record(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(**fields).SerializeToString())
    return buffer.getvalue()
