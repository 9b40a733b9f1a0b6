"""From labels to latents: the trained model, run by the sampler of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ecar_dist.kinds.table import KINDS
from ecar_dist.sample.sampling_plan import SamplingPlan


@torch.no_grad()
def generate(
    model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """Draw one sample per label. Returns X^e_k of every stage, [B, C, h_k, w_k], the last one the normalised latent.

    labels int64 [B]; indices int64 [B], the numbers of the samples. Sample i of a seed does not depend on its batch.
    """
    return KINDS[plan.kind].draw(model, plan, labels, indices, seed)


@torch.no_grad()
def velocities(
    model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """The model's velocities at inputs that are all keyed by index and seed: K of [B, C, h_k, w_k]."""
    return KINDS[plan.kind].velocities(model, plan, labels, indices, seed)


def generate_in_batches(
    model: Any, plan: SamplingPlan, labels: torch.Tensor, seed: int, batch_size: int, *, fill: bool = False
) -> Iterator[list[torch.Tensor]]:
    """`generate` for sample 0, 1, 2, ... of a seed, `batch_size` at a time.

    fill: draw the last batch at the size of the others, for a model compiled for that size, and drop the excess.
    """
    indices = torch.arange(labels.shape[0], device=labels.device)
    for chunk in indices.split(batch_size):
        # Fill up with the first samples, which are dropped afterwards.
        missing = min(batch_size, len(indices)) - len(chunk) if fill else 0
        drawn = torch.cat((chunk, indices[:missing]))
        yield [stage[: len(chunk)] for stage in generate(model, plan, labels[drawn], drawn, seed)]
