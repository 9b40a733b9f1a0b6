"""Whether a training run fits the nodes that are requested for it, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ecar_dist.cluster.resources import Resources, startable_counts
from ecar_dist.config.batch import divides
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.plan.memory import DeviceMemory, capacity, device_memory, precision_of
from ecar_dist.plan.report import gib, plan_lines
from ecar_dist.runtime.devices import find_device


def fitness_lines(config: RunConfig, resources: Resources, device: str | None) -> list[str]:
    """The plan of the run on these nodes.

    Raises ConfigError if the batch does not divide on them, or if the training does not fit in device memory.
    """
    # For a range of nodes, the numbers that the batch divides on are listed.
    ranks = resources.ranks
    counts = startable_counts(config, resources)
    if device is not None:
        _check_memory(config, resources, device)

    given = f"{resources.nodes}" if len(counts) == 1 else f"{resources.fewest} to {resources.nodes}"
    return [
        f"nodes: {given} requested, runs on {', '.join(map(str, counts))} with {ranks} ranks each",
        *plan_lines(config, resources.nodes * ranks, device, gpus_per_node=max(1, resources.gpus_per_node)),
    ]


def _check_memory(config: RunConfig, resources: Resources, device: str) -> None:
    known = find_device(device)
    if known is None:
        return  # plan_lines refuses an unknown device
    usable = capacity(known)
    if _fits(config, resources, usable):
        return

    # What is needed, for which part, and what would fit.
    world_size, memory = _most_memory(config, resources)
    micro = config.batch.micro_batch_size
    parts = (
        f"{gib(memory.state.total)} state + {gib(memory.backward)} gradients and buckets + "
        f"{gib(memory.image * micro)} activations"
    )
    fix = ", or ".join(_fixes(config, resources, usable)) or "more nodes, or a smaller model.preset"
    raise ConfigError(
        f"batch.micro_batch_size={micro} with deepspeed.zero_stage={config.deepspeed.zero_stage} on {world_size} ranks "
        f"needs {gib(memory.total(micro))} per GPU ({parts}), "
        f"{device.upper()} has {gib(usable)} usable; use {fix}"
    )


def _most_memory(config: RunConfig, resources: Resources) -> tuple[int, DeviceMemory]:
    """The fewest ranks that the run may start on, and the memory of each: its share of the state is largest there."""
    world_size = startable_counts(config, resources)[0] * resources.ranks
    return world_size, device_memory(
        config,
        world_size,
        zero_stage=config.deepspeed.zero_stage,
        compiled=config.compiles_on("cuda"),
        recompute=config.train.activation_checkpointing,
    )


def _fits(config: RunConfig, resources: Resources, usable: int) -> bool:
    return _most_memory(config, resources)[1].total(config.batch.micro_batch_size) <= usable


def _fixes(config: RunConfig, resources: Resources, usable: int) -> list[str]:
    """Settings that fit, as `section.key=value`; only those with the fewest changes."""
    found = list(_fitting_changes(config, resources, usable))
    fewest = min(map(len, found), default=0)
    return [" ".join(changes) for changes in found if len(changes) == fewest]


def _fitting_changes(config: RunConfig, resources: Resources, usable: int) -> Iterator[tuple[str, ...]]:
    """For each combination of micro-batch and recomputation, the lowest ZeRO stage that fits.

    The lowest stage needs the least communication.
    """
    recompute = config.train.activation_checkpointing
    stage = config.deepspeed.zero_stage
    for smaller, recomputes in product((False, True), sorted({recompute, True})):
        for zero_stage in range(stage, 4):
            train = config.train.model_copy(update={"activation_checkpointing": recomputes})
            deepspeed = config.deepspeed.model_copy(update={"zero_stage": zero_stage})
            same_batch = config.model_copy(update={"train": train, "deepspeed": deepspeed})
            changed = _with_smaller_batch(same_batch, resources, usable) if smaller else same_batch
            if changed is None or not _fits(changed, resources, usable):
                continue

            # The first stage that fits is enough.
            settings = {
                f"batch.micro_batch_size={changed.batch.micro_batch_size}": smaller,
                "train.activation_checkpointing=true": recomputes != recompute,
                f"deepspeed.zero_stage={zero_stage}": zero_stage != stage,
            }
            yield tuple(setting for setting, is_changed in settings.items() if is_changed)
            break


def _with_smaller_batch(config: RunConfig, resources: Resources, usable: int) -> RunConfig | None:
    """The config with the largest smaller micro-batch that fits and divides the batch on all nodes, if there is one."""
    # ZeRO 0 cannot add up micro-batches in bf16.
    if config.deepspeed.zero_stage == 0 and precision_of(config) == "bf16":
        return None

    total = config.batch.global_batch_size
    for micro in range(config.batch.micro_batch_size - 1, 0, -1):
        if divides(total, micro, resources.nodes * resources.ranks):
            batch = config.batch.model_copy(update={"micro_batch_size": micro})
            smaller = config.model_copy(update={"batch": batch})
            if _fits(smaller, resources, usable):
                return smaller
    return None
