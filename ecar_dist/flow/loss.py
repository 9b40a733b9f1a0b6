"""The losses: flow matching of all stages, eq. (5), and of tokens; cross-entropy of codes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def stage_losses(velocities: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared error per sample and stage, float32 [B, K]; inputs are K of [B, C, h_k, w_k]."""
    # Mean over the elements of a stage, eq. (5): stages of all resolutions have the same weight.
    errors = [(v.float() - d).square().flatten(1).mean(1) for v, d in zip(velocities, targets, strict=True)]
    return torch.stack(errors, dim=1)


def multistage_loss(per_stage: torch.Tensor, stage_weights: Sequence[float]) -> torch.Tensor:
    """sum_k w_k L_k, averaged over the batch, from `stage_losses` [B, K]."""
    weights = _weights_on(tuple(stage_weights), per_stage.device)  # [K]
    return (per_stage.mean(0) * weights).sum()


@functools.lru_cache(maxsize=64)  # otherwise each micro-batch would wait for a copy from the host
def _weights_on(stage_weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # weights first made in evaluation must also work in training
        return torch.tensor(stage_weights, dtype=torch.float32, device=device)


def masked_loss(velocities: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error over draws, channels and masked tokens, float32 [B]; inputs [B, R, T, c], mask bool [B, T]."""
    errors = (velocities.float() - targets).square().mean(dim=(1, 3))  # [B, T]
    # Each sample divides by its own number of masked tokens, so that all samples have the same weight.
    return (errors * mask).sum(1) / mask.sum(1)


def token_loss(velocities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error over draws, channels and all tokens, float32 [B]; inputs [B, R, T, c]."""
    return (velocities.float() - targets).square().flatten(1).mean(1)


def masked_code_loss(logits: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over each sample's masked tokens, float32 [B]; mask bool [B, T], see `code_loss`."""
    errors = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape)
    return (errors * mask).sum(1) / mask.sum(1)


def code_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over the tokens of a sample, float32 [B]; logits [B, T, V], codes int64 [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape).mean(1)
