"""The signals that end a rank: those that ask for an early, clean end, and the one that is sent when its launcher dies.

Until training begins there is nothing to save, so a stop signal ends the process at once. From then on the handler only
sets a flag, and the loop reads it between two steps. A launcher or a scheduler may send many signals in a burst; a
burst counts as one signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BURST_SECONDS = 10.0  # after a signal has ended a run before its first step, further ones are ignored for this time
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class StoppedEarlyError(BaseException):
    """A signal came before the first step. Not an Exception, so that no handler on the way takes it for a failure."""


class StopRequest:
    """True once this process has been asked to stop. A second SIGINT ends the run at once, without a checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._complete = False
        self._ends_since = float("-inf")
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """From now on a signal only sets the flag."""
        self._deferred = True

    def mark_complete(self) -> None:
        """The last step is done: a signal before or after this moment no longer stops anything early."""
        self._complete = True

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
        """Raises StoppedEarlyError, unless one was just raised: a second one would interrupt the clean end."""
        if time.monotonic() - self._ends_since > BURST_SECONDS:
            self._ends_since = time.monotonic()
            assert self.received is not None
            raise StoppedEarlyError(f"stopped by {self.received.name} before the first step")

    def __bool__(self) -> bool:
        return self.received is not None and not self._complete


def die_with_parent() -> None:
    """From now on this process gets SIGKILL when its parent ends: an orphan would still write to the run directory.

    For ranks under a launcher only, and only on Linux. For the kernel the parent is a *thread*: torchrun, deepspeed and
    slurmstepd all start their ranks from the thread that waits for them.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Undo `die_with_parent`, in the thread that called it: this process is about to end by itself.

    torchrun forwards a signal to its ranks and waits for them, but a third signal ends torchrun itself. The ranks still
    complete the last step and its checkpoint.
    """
    if sys.platform == "linux":
        _set_parent_death_signal(0)


def _set_parent_death_signal(number: int) -> None:
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
