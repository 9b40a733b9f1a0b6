"""Whether a config fits the nodes it is submitted to, as far as a login node can tell: batch and memory."""

from __future__ import annotations

from ecar_dist.cluster.resources import Resources
from ecar_dist.cluster.size import usable_counts
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import ModelState, model_state
from ecar_dist.plan.report import plan_lines
from ecar_dist.runtime.devices import device_memory


def fitness_lines(config: RunConfig, resources: Resources, device: str | None) -> list[str]:
    """The plan of the run on these nodes. Raises ConfigError where the batch does not divide on them, or where the
    model's state is larger than the memory of the device."""
    ranks = resources.ranks
    usable_counts(config, resources.nodes, resources.nodes, ranks)
    counts = usable_counts(config, resources.fewest, resources.nodes, ranks)
    if device is not None:
        _check_memory(config, counts[0] * ranks, device)
    on = ", ".join(map(str, counts))
    given = f"{resources.nodes}" if len(counts) == 1 else f"{resources.fewest} to {resources.nodes}"
    return [
        f"nodes: of {given} it runs on {on}, {ranks} ranks each",
        *plan_lines(config, resources.nodes * ranks, device),
    ]


def _check_memory(config: RunConfig, world_size: int, device: str) -> None:
    memory = device_memory(device)
    if memory is None:
        return  # plan_lines refuses it by name
    chosen = config.deepspeed.zero_stage
    needed = {zero_stage: _on_device(config, world_size, zero_stage) for zero_stage in range(chosen, 4)}
    if needed[chosen] <= memory:
        return
    fitting = [f"deepspeed.zero_stage={zero_stage}" for zero_stage, state in needed.items() if state <= memory]
    fix = (fitting or ["more nodes, or a smaller model.preset"])[0]
    raise ConfigError(
        f"the model's state is {needed[chosen] / 2**30:.3g} GiB a rank at zero_stage {chosen} on {world_size} ranks, "
        f"{device.upper()} has {memory / 2**30:.3g} GiB; use {fix}"
    )


def _on_device(config: RunConfig, world_size: int, zero_stage: int) -> int:
    """Bytes of the model's state that stay on the device: what is offloaded does not count."""
    precision = "fp32" if config.deepspeed.precision == "fp32" else "bf16"
    state: ModelState = model_state(kind_of(config).parameters(config).total, world_size, zero_stage, precision)
    offloaded = (state.optimizer + state.ema) * config.deepspeed.offload_optimizer
    return state.total - offloaded - state.weights * config.deepspeed.offload_params
