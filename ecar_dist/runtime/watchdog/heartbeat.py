"""The heartbeat: the current position of a rank, in memory that it shares with its monitor.

Standard library only: the monitor imports this module.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# Phase -> how many times hang_seconds it may last. Only phases that all ranks enter together get more than 1. If one
# rank were slow in a long phase while the others waited for it in a shorter one, their limit would end the job.
PHASES = {
    "start": 3,
    "load": 3,
    "data": 1,
    "forward": 1,
    "backward": 1,
    "optimizer": 1,
    "checkpoint": 3,
    "log": 1,
    "preview": 1,
    "validate": 1,
}
FIRST_STEPS = 2  # kernels are compiled, caches filled, connections made
FIRST_STEPS_FACTOR = 3
LONGEST_FACTOR = max(FIRST_STEPS_FACTOR, *PHASES.values())

NO_STEP = -1
LAYOUT = struct.Struct("=qqqq")  # step, beat within the step, index of the phase, first step of this attempt
PHASE_INDEX = {name: index for index, name in enumerate(PHASES)}
_PHASE_NAMES = tuple(PHASES)


class Heartbeat(NamedTuple):
    """One beat. Ranks that do the same work have the same beats in a step, so (step, beat) shows which is behind."""

    step: int
    beat: int
    phase: str
    first_step: int

    def limit(self, hang_seconds: float) -> float:
        """Seconds without a new beat after which the rank counts as hung."""
        in_first_steps = self.first_step != NO_STEP and self.step < self.first_step + FIRST_STEPS
        return hang_seconds * max(PHASES[self.phase], FIRST_STEPS_FACTOR if in_first_steps else 1)


def read_heartbeat(memory: bytes) -> Heartbeat:
    """The heartbeat in the shared memory, which has LAYOUT."""
    step, beat, phase, first_step = LAYOUT.unpack_from(memory)
    return Heartbeat(step, beat, _PHASE_NAMES[phase], first_step)
