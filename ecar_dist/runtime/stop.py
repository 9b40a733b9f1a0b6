"""Signals that ask for an early, clean end.

Until training begins there is nothing to save, so a signal ends the process at once; from then on the handler only
raises a flag, and the loop reads it between two steps.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StoppedEarlyError(BaseException):
    """A signal came before the first step. No `except Exception` on the way shall take it for a failure."""


class StopRequest:
    """True once this process was asked to stop. A second SIGINT means it: the run ends without a checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = self._too_late = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """From now on a signal raises the flag only."""
        self._deferred = True

    def come_too_late(self) -> None:
        """The last step is made: what was asked, or is yet to be, ends nothing early."""
        self._too_late = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, self.received or signal.Signals(number)
        if not self._deferred:
            raise StoppedEarlyError(f"stopped by {signal.Signals(number).name} before the first step")
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        return self.received is not None and not self._too_late
