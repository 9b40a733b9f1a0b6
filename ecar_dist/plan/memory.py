"""Bytes of model state per rank, and of a checkpoint.

ZeRO (Rajbhandari et al., arXiv 1910.02054): mixed-precision Adam holds 2 bytes of weights, 2 of gradients and 12 of
optimizer state (fp32 master weights and two moments) per parameter; stage 1 divides the optimizer state over the ranks,
stage 2 the gradients too, stage 3 the weights too. The fp32 EMA, 4 bytes, is divided like the optimizer state.
Activations, communication buckets and the allocator's overhead are not estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOMENT_BYTES = 8  # two fp32 Adam moments
EMA_BYTES = 4
CHECKPOINT_BYTES = 4 + MOMENT_BYTES + EMA_BYTES  # fp32 master weights, moments, EMA


@dataclass(frozen=True)
class ModelState:
    """Bytes per rank."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


def model_state(num_parameters: int, world_size: int, zero_stage: int, precision: str) -> ModelState:
    """State of one rank; `precision` is `bf16` or `fp32`.

    In fp32 at stage 0 the weights are their own master weights. From stage 1 on, DeepSpeed keeps a partitioned fp32
    copy as well.
    """

    def share(bytes_each: int, *, divided_from: int) -> int:
        return bytes_each * math.ceil(num_parameters / (world_size if zero_stage >= divided_from else 1))

    # Bytes of a weight or gradient, and of its fp32 master copy.
    width = 2 if precision == "bf16" else 4
    master = 0 if precision == "fp32" and zero_stage == 0 else 4
    return ModelState(
        weights=share(width, divided_from=3),
        gradients=share(width, divided_from=2),
        optimizer=share(master + MOMENT_BYTES, divided_from=1),
        ema=share(EMA_BYTES, divided_from=1),
    )


def checkpoint_bytes(num_parameters: int) -> int:
    """A checkpoint of all ranks: 16 bytes per parameter at any ZeRO stage and precision."""
    return CHECKPOINT_BYTES * num_parameters
