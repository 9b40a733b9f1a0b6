"""What a rank can know of the others when they end: an agreed error, or a connection that breaks."""

from __future__ import annotations

import re

# What gloo, NCCL and torch's store say when the other end is gone or silent. Most of it is a bare RuntimeError.
_TRANSPORT = re.compile(r"gloo|nccl|c10d|TCPStore", re.IGNORECASE)
_LOST = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|timed out|timeout"
    r"|remote process exited|ncclRemoteError|communicator was aborted"
    r"|did the remote server shutdown or crash|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_SOURCE_PLACE = re.compile(r"^\[\S+\]\s*")  # gloo opens with the C++ file it speaks from


class RemoteError(Exception):
    """Another rank met an error, and says which: this one ends without a word.

    `again`: the same command may run again as it is, since a rank or a node was lost and nothing has to be fixed.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


def lost_peer(error: BaseException) -> str | None:
    """What the transport said, in a few words, where `error` means that another rank is gone; else None.

    DeepSpeed's own collectives raise from inside forward, backward and step, so this looks at any RuntimeError, and at
    what an error was raised from.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, RuntimeError) and (_of_torch(cause) or _TRANSPORT.search(text)) and _LOST.search(text):
            line = next(line for line in text.splitlines() if _LOST.search(line))
            return _SOURCE_PLACE.sub("", line).split(". ")[0].strip().rstrip(".")
        cause = cause.__cause__
    return None


def _of_torch(error: RuntimeError) -> bool:
    """By name: torch.distributed is at home in `world`, and the watchdog's processes do without torch."""
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__)
