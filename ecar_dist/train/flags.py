"""The flags that the ranks exchange in every step."""

from __future__ import annotations

from typing import NamedTuple


class Flags(NamedTuple):
    """0 or 1 for one rank; a number of ranks once they are summed. They are summed together with the losses."""

    stop: float  # asked to stop
    failed: float  # cannot read the samples of the step after the next
    ready: float  # has done its part of the save under way
    early: float = 0.0  # rank 0 only: less than checkpoint.min_seconds have passed since the last save
