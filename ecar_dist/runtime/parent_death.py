"""A rank does not outlive what launched it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on SIGKILL to this process when its parent ends: an orphan would go on writing to the run directory.

    For ranks under a launcher only, and only on Linux. The kernel means the parent *thread*: torchrun, deepspeed and
    slurmstepd all start their ranks from the thread that waits for them.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended while we asked
        os.kill(os.getpid(), signal.SIGKILL)
