"""From clean latents to what the network sees and must predict, eq. (1)-(4) and section 7.1 of docs/ecar.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecar_dist.flow.pyramid import latent_pyramid, noise_pyramid, upsample
from ecar_dist.flow.schedule import StageSchedule


@dataclass(frozen=True)
class TrainingPoints:
    """One training example per stage and sample; lists run from the coarsest stage to the finest."""

    contexts: list[torch.Tensor]  # C_k, the states that are fed back: K-1 of [B, C, h_k, w_k], or empty
    states: list[torch.Tensor]  # x_u, the points on the paths: K of [B, C, h_k, w_k]
    times: list[torch.Tensor]  # model times: K of [B]
    targets: list[torch.Tensor]  # d_k, the velocities: K of [B, C, h_k, w_k]


def stage_endpoints(
    schedule: StageSchedule, latents: list[torch.Tensor], noises: list[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(X^s_k, X^e_k) of every stage, eq. (1)-(3), from the pyramids of latents and noise (K of [B, C, h_k, w_k])."""
    endpoints = []
    for k, (start, end) in enumerate(zip(schedule.starts, schedule.ends, strict=True)):
        # Eq. (1): the stage ends at its own latent, noisy except in the last stage.
        state_end = end * latents[k] + (1.0 - end) * noises[k]
        # Eq. (2)-(3): it starts at the upsampled coarser latent with the same noise; the first stage, at pure noise.
        if k == 0:
            state_start = noises[0]
        else:
            state_start = start * upsample(latents[k - 1], schedule.factor) + (1.0 - start) * noises[k]
        endpoints.append((state_start, state_end))
    return endpoints


def interpolate(start: torch.Tensor, end: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """x_u = (1 - u) X^s + u X^e, eq. (4), for u [B] and states [B, C, H, W]."""
    # One time per sample, the same at all of its pixels.
    weight = u.view(-1, 1, 1, 1)
    return (1.0 - weight) * start + weight * end


def logit_normal_times(uniform: torch.Tensor) -> torch.Tensor:
    """Logit-normal times with m = 0, s = 1, from U(0, 1) numbers; same shape.

    Esser et al., arXiv 2403.03206, section 3.1: fewer times near both ends of a path than in its middle.
    """
    return torch.sigmoid(torch.special.ndtri(uniform))


def model_time(schedule: StageSchedule, stage: int, u: torch.Tensor) -> torch.Tensor:
    """mt_k(u) in [0, 1], distinct between stages; float32, same shape as u."""
    # Time in float32 even under autocast: bf16 would merge neighbouring times.
    low, high = schedule.model_windows[stage]
    return low + u.float() * (high - low)


def training_points(
    schedule: StageSchedule,
    latents: torch.Tensor,
    noise_draws: list[torch.Tensor],
    times: list[torch.Tensor],
    context_draws: list[torch.Tensor],
    tau: float | None,
) -> TrainingPoints:
    """Build the K training examples of a batch.

    Arguments:
        latents: z, normalised, [B, C, H, W].
        noise_draws: N(0, I) at each stage's size, K of [B, C, h_k, w_k].
        times: u in [0, 1], the time within each stage, K of [B].
        context_draws: xi of C_k = X^e_k + tau xi_k, N(0, I) and independent of everything else (section 5: the trap),
            K-1 of [B, C, h_k, w_k]; empty if tau is None.
        tau: std of the noise on the contexts; None for a model that is fed no states, which gets no contexts.
    """
    # Both pyramids, and the two ends of every stage's path.
    pyramid = latent_pyramid(latents, schedule.num_stages, schedule.factor)
    endpoints = stage_endpoints(schedule, pyramid, noise_pyramid(noise_draws, schedule))

    # The finest stage is not fed back: nothing comes after it.
    fed_back = [] if tau is None else endpoints[:-1]
    return TrainingPoints(
        contexts=[end + (tau or 0.0) * xi for (_, end), xi in zip(fed_back, context_draws, strict=True)],
        states=[interpolate(start, end, u) for (start, end), u in zip(endpoints, times, strict=True)],
        times=[model_time(schedule, k, u) for k, u in enumerate(times)],
        targets=[end - start for start, end in endpoints],
    )
