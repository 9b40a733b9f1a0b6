"""Signals that ask for an early, clean end: the handler only raises a flag; the loop reads it between two steps."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this process was asked to stop. A second signal changes nothing."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def __bool__(self) -> bool:
        return self.received is not None
