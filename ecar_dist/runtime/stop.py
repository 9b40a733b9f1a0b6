"""Signals that ask for an early, clean end.

Until training begins there is nothing to save, so a signal ends the process at once; from then on the handler only
raises a flag, and the loop reads it between two steps. Many signals ask for no more than one does: a launcher or a
scheduler may send them in a burst.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

from ecar_dist.runtime.parent_death import outlive_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BURST_SECONDS = 10.0  # in which an end that has begun before the first step is not begun again


class StoppedEarlyError(BaseException):
    """A signal came before the first step. No `except Exception` on the way shall take it for a failure."""


class StopRequest:
    """True once this process was asked to stop. A second SIGINT means it: the run ends without a checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = self._too_late = False
        self._ends_since = float("-inf")
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """From now on a signal raises the flag only."""
        self._deferred = True

    def come_too_late(self) -> None:
        """The last step is made: what was asked, or is yet to be, ends nothing early."""
        self._too_late = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or signal.Signals(number)
        if not self._deferred:
            self._end_now()
        elif again and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            outlive_parent()

    def _end_now(self) -> None:
        """Raises StoppedEarlyError, unless one is on its way: another in its midst would cut the clean end short."""
        if time.monotonic() - self._ends_since > BURST_SECONDS:
            self._ends_since = time.monotonic()
            assert self.received is not None
            raise StoppedEarlyError(f"stopped by {self.received.name} before the first step")

    def __bool__(self) -> bool:
        return self.received is not None and not self._too_late
