"""What the ranks tell each other in every step."""

from __future__ import annotations

from typing import NamedTuple


class Flags(NamedTuple):
    """0 or 1 of one rank; a number of ranks once they are summed. They travel in the sum of the losses."""

    stop: float  # asked to stop
    failed: float  # cannot read the samples of the step after the next
    ready: float  # has done its part of the save under way
    early: float = 0.0  # rank 0 alone: checkpoint.min_seconds have not passed since the last save
