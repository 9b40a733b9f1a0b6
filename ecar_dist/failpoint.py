"""Failpoints: sites in the code where a drill or a test injects a fault. In a normal run they do nothing.

ECAR_FAILPOINT has one or more points, separated by commas: `SITE[:rank=R][:step=S][:nth=N]:ACTION`, for example
`checkpoint.write:rank=1:nth=2:kill`. ACTION is one of

    kill       SIGKILL to this process          raise      RuntimeError
    stop       SIGSTOP to this process          enospc     OSError, no space left on device
    hang       sleep for ever                   eio        OSError, input/output error
    gil        the same, holding Python's lock  delay=SEC  sleep
    nan        nothing here: the caller sets its numbers to NaN
    burn=SEC   compute for SEC seconds of CPU time
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import time
from collections import Counter
from typing import NoReturn

from ecar_dist.errors import ConfigError

ACTIONS = ("kill", "stop", "hang", "gil", "nan", "raise", "enospc", "eio", "delay=SECONDS", "burn=SECONDS")
_POINT = re.compile(r"[a-z.]+(:(rank|step|nth)=\d+)*:(kill|stop|hang|gil|nan|raise|enospc|eio|(delay|burn)=[\d.]+)")
_reached: Counter[str] = Counter()


def faults_on_purpose() -> str | None:
    """A warning for the log of a run with failpoints; None in a normal run.

    Raises ConfigError if ECAR_FAILPOINT is not a list of points.
    """
    points = os.environ.get("ECAR_FAILPOINT")
    if not points:
        return None
    for point in points.split(","):
        if not _POINT.fullmatch(point):
            raise ConfigError(
                f"ECAR_FAILPOINT: {point!r} is not SITE[:rank=R][:step=S][:nth=N]:ACTION with one of the actions "
                f"{', '.join(ACTIONS)}; fix it, or unset it"
            )
    return f"warning: this run injects faults on purpose (ECAR_FAILPOINT={points}); unset it to train"


def failpoint(site: str, step: int | None = None) -> bool:
    """Run the action of ECAR_FAILPOINT for `site`. True if the action is `nan`, which the caller must apply."""
    points = os.environ.get("ECAR_FAILPOINT")
    if not points:
        return False
    _reached[site] += 1
    here = {"rank": os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")), "nth": str(_reached[site])}
    if step is not None:
        here["step"] = str(step)

    # the first point for this site, rank, step and call
    for name, *conditions, action in (point.split(":") for point in points.split(",")):
        if name == site and all(here.get(key) == value for key, value in (c.split("=") for c in conditions)):
            return _strike(action, site)
    return False


def _strike(action: str, site: str) -> bool:
    name, _, value = action.partition("=")
    if name in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if name == "kill" else signal.SIGSTOP)
    elif name == "delay":
        time.sleep(float(value))
    elif name == "burn":
        until = time.thread_time() + float(value)
        while time.thread_time() < until:
            pass
    elif name == "hang":
        _sleep_for_ever()
    elif name == "gil":
        ctypes.PyDLL(None).pause()  # a PyDLL call keeps the lock, so no thread of this process can run
    elif name in ("enospc", "eio"):
        number = errno.ENOSPC if name == "enospc" else errno.EIO
        raise OSError(number, os.strerror(number), site)
    elif name == "raise":
        raise RuntimeError(f"failpoint {site}")
    return name == "nan"


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)
