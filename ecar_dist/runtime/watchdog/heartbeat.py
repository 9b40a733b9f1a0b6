"""Where a rank is, in memory that it shares with its monitor. Standard library only: the monitor imports this."""

from __future__ import annotations

import struct
from typing import NamedTuple

# Phase -> how many times hang_seconds it may last. The slow ones are those in which every rank is at the same time:
# were one rank slow by right and the others not, the others' limit would end the job.
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
}
FIRST_STEPS, FIRST_STEPS_FACTOR = 2, 3  # kernels are compiled, caches filled, connections made
LONGEST_FACTOR = max(FIRST_STEPS_FACTOR, *PHASES.values())

NO_STEP = -1
LAYOUT = struct.Struct("=qqqq")  # step, beat within the step, index of the phase, first step of this attempt
PHASE_INDEX = {name: index for index, name in enumerate(PHASES)}
_PHASE_NAMES = tuple(PHASES)


class Place(NamedTuple):
    """One beat. Ranks that do the same have the same beats in a step, so (step, beat) says who is behind."""

    step: int
    beat: int
    phase: str
    first_step: int

    def patience(self, hang_seconds: float) -> float:
        """Seconds that a rank may stay here."""
        first_steps = self.first_step != NO_STEP and self.step < self.first_step + FIRST_STEPS
        return hang_seconds * max(PHASES[self.phase], FIRST_STEPS_FACTOR if first_steps else 1)


def read_place(memory: bytes) -> Place:
    step, beat, phase, first_step = LAYOUT.unpack_from(memory)
    return Place(step, beat, _PHASE_NAMES[phase], first_step)
