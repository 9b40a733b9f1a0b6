"""How a rank learns about the end of another: by an error that all agree on, or by a connection that breaks."""

from __future__ import annotations

import re

# Messages of gloo, NCCL and torch's store when the other end is gone or silent. Most are plain RuntimeErrors.
_TRANSPORT = re.compile(r"gloo|nccl|c10d|TCPStore", re.IGNORECASE)
_LOST = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|timed out|timeout"
    r"|remote process exited|ncclRemoteError|communicator was aborted"
    r"|did the remote server shutdown or crash|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_SOURCE_LOCATION = re.compile(r"^\[\S+\]\s*")  # gloo begins with its C++ source file


class RemoteError(Exception):
    """Another rank raised an error and prints it; this one ends without a message.

    `again`: the same command can be run again unchanged, because a rank or a node was lost and nothing has to be fixed.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


def lost_peer(error: BaseException) -> str | None:
    """The transport's message, shortened, if `error` means that another rank is gone; else None.

    DeepSpeed's own collectives raise inside forward, backward and step, so this looks at any RuntimeError and at its
    causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, RuntimeError) and (_of_torch(cause) or _TRANSPORT.search(text)) and _LOST.search(text):
            line = next(line for line in text.splitlines() if _LOST.search(line))
            return _SOURCE_LOCATION.sub("", line).split(". ")[0].strip().rstrip(".")
        cause = cause.__cause__
    return None


def _of_torch(error: RuntimeError) -> bool:
    """Compares names, because the watchdog imports this module and must not import torch."""
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__)
