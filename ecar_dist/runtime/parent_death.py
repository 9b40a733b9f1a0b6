"""A rank does not outlive what launched it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """From now on SIGKILL to this process when its parent ends: an orphan would go on writing to the run directory.

    For ranks under a launcher only, and only on Linux. The kernel means the parent *thread*: torchrun, deepspeed and
    slurmstepd all start their ranks from the thread that waits for them.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    _ask_for(signal.SIGKILL)
    if os.getppid() != parent:  # it ended while we asked
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Take `die_with_parent` back, in the thread that asked for it: this process is about to end by itself.

    torchrun passes a signal on to its ranks and waits for them, but it is gone at its third signal. What it asked for,
    the last step and its checkpoint, is to be done all the same.
    """
    if sys.platform == "linux":
        _ask_for(0)


def _ask_for(number: int) -> None:
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
