"""The sampler: K stages of flow, each starting where the previous one ended; section 8 of docs/ecar.md.

It knows nothing about networks or labels: velocities come from `begin_stage`, and random numbers from `draw`. The exact
tests run closed-form velocities through this same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ecar_dist.flow.pyramid import stage_jump
from ecar_dist.flow.schedule import StageSchedule
from ecar_dist.flow.solvers import Solver, VelocityFn
from ecar_dist.rng import Purpose

BeginStage = Callable[[int, torch.Tensor | None], VelocityFn]  # (stage, context) -> velocity_fn(x, u)
Draw = Callable[[Purpose, int], torch.Tensor]  # (purpose, stage) -> N(0, I) noise of the stage's shape


def sample_stages(
    schedule: StageSchedule,
    begin_stage: BeginStage,
    draw: Draw,
    *,
    tau: float | None,
    solver: Solver,
    steps_per_stage: Sequence[int],
    time_shift: float = 1.0,
    given: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Draw a batch. Returns X^e_k of every stage, [B, C, h_k, w_k] coarse to fine. The last one is the latent.

    `begin_stage` is called once per stage, in order, with the context C_{k-1} = X^e_{k-1} + tau xi. The context is None
    in stage 0, and in every stage of a model that is fed no states (tau is None). The solver's grid is shifted within
    each stage (`time_grid`). `given`: X^e_k of the first stages, for instance of real images; the others are drawn.
    """
    # Start from pure noise at the coarsest resolution, eq. (3).
    x = draw(Purpose.GENERATE_START, 0)
    ends: list[torch.Tensor] = []

    for stage in range(schedule.num_stages):
        context = None
        if stage > 0:
            # Feed back the end of the previous stage with fresh noise, before it is upsampled (section 5).
            if tau is not None:
                context = x + tau * draw(Purpose.GENERATE_CONTEXT, stage - 1) if tau else x
            # Jump to the next resolution: upsample, rescale and renoise, eq. (6).
            x = stage_jump(x, draw(Purpose.GENERATE_JUMP, stage), stage, schedule)

        # Integrate dx/du = v from X^s_k at u = 0 to X^e_k at u = 1.
        velocity = begin_stage(stage, context)
        x = given[stage] if stage < len(given) else solver(velocity, x, steps_per_stage[stage], time_shift)
        ends.append(x)
    return ends
