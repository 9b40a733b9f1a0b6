"""How the ranks of a node find their monitor: by a name that the kernel gives to the first rank that asks for it.

The name is that of an abstract Unix socket (unix(7)): it exists as long as the monitor listens on it, and leaves no
file. Every network namespace has its own names. The user and the PID namespace are part of the name, so that a monitor
can see the process of every rank that connects.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket

from ecar_dist.runtime.watchdog.watched import owner

SEARCH_SECONDS = 2.0  # for a rank to find the monitor of its node, or to take the name and start one
PAUSE_SECONDS = 0.01
_WAITING = 1024  # ranks that may connect before the monitor has started


def name_for(folder: str) -> bytes:
    """The name shared by all ranks of a node that use this folder for their reports."""
    whose = f"{os.getuid()} {os.readlink('/proc/self/ns/pid')} {folder}"
    return b"\0ecar-dist-watchdog-" + hashlib.sha256(whose.encode()).hexdigest()[:32].encode()


def take(name: bytes) -> socket.socket | None:
    """The listening socket for the monitor that this rank will start; None if another rank was first.

    Raises OSError where such names are not supported.
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
    """A connection to the monitor with this name; None if it has just ended, does not listen yet, or is not ours."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(OSError):
        link.connect(name)
        if owner(link)[1] == os.getuid():
            return link
    link.close()
    return None


def introduce(link: socket.socket, rank: int, heartbeat_file: int, stacks_file: int) -> bool:
    """Send the monitor the rank's number and the files that it shares; False if the monitor has ended."""
    try:
        socket.send_fds(link, [str(rank).encode()], [heartbeat_file, stacks_file])
    except OSError:
        return False
    return True
