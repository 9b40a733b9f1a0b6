"""The batch arithmetic: global_batch_size = micro_batch_size x grad_accum_steps x world_size."""

from __future__ import annotations

from ecar_dist.errors import ConfigError


def divides(global_batch_size: int, micro_batch_size: int, world_size: int) -> bool:
    """Whether every rank gets a whole number of micro-batches in each optimizer step."""
    return global_batch_size % (micro_batch_size * world_size) == 0


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-steps of each rank per optimizer step. Raises ConfigError if the numbers do not divide evenly."""
    if not divides(global_batch_size, micro_batch_size, world_size):
        raise ConfigError(mismatch(global_batch_size, micro_batch_size, world_size))
    return global_batch_size // (micro_batch_size * world_size)


def mismatch(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    """The error message for numbers that do not divide evenly, with the nearest global batch sizes that do."""
    unit = micro_batch_size * world_size
    below = global_batch_size // unit * unit
    fits = f"{below} or {below + unit}" if below else f"{unit}"
    return (
        f"batch.global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
        f"{micro_batch_size} x {world_size} = {unit}; set batch.global_batch_size={fits}"
    )
