"""Where the ranks of a node meet their monitor: a name that the kernel gives to the first rank that asks for it.

The name is an abstract Unix socket (unix(7)): it lasts as long as the monitor that listens there, and leaves no file.
Every network namespace has its own names. The user and the PID namespace are parts of the name, so that a monitor sees
the process of every rank that comes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket

from ecar_dist.runtime.watchdog.watched import owner

SEARCH_SECONDS = 2.0  # for a rank to find the monitor of its node, or to take its place
PAUSE_SECONDS = 0.01
_WAITING = 1024  # ranks that may have come before the monitor has started


def name_for(folder: str) -> bytes:
    """The name that ranks with this folder of reports share on a node."""
    whose = f"{os.getuid()} {os.readlink('/proc/self/ns/pid')} {folder}"
    return b"\0ecar-dist-watchdog-" + hashlib.sha256(whose.encode()).hexdigest()[:32].encode()


def take(name: bytes) -> socket.socket | None:
    """The socket on which the monitor that this rank now starts listens; None if another rank was first.

    Raises OSError where there are no such names.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(name)
        listener.listen(_WAITING)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return listener


def join(name: bytes) -> socket.socket | None:
    """A connection to the monitor that has the name; None if it has just ended, does not listen yet, or is not ours."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(OSError):
        link.connect(name)
        if owner(link)[1] == os.getuid():
            return link
    link.close()
    return None


def introduce(link: socket.socket, rank: int, heartbeat_file: int, stacks_file: int) -> bool:
    """Give the monitor what the rank shares with it; False if it has ended."""
    try:
        socket.send_fds(link, [str(rank).encode()], [heartbeat_file, stacks_file])
    except OSError:
        return False
    return True
