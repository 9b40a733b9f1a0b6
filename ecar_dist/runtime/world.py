"""Which process this is, and the few collectives the rest of the code needs. The one home of torch.distributed."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ecar_dist.errors import ConfigError
from ecar_dist.runtime.peers import RemoteError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Placement:
    """Where the launcher put this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 29500


def placement_from_environment(environment: Mapping[str, str]) -> Placement:
    """Read the variables of torchrun or deepspeed, else of srun, else a world of one process."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Placement(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", 1))),
            master_address=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT", 29500)),
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return Placement(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
            master_address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            master_port=int(environment.get("MASTER_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 20000),
        )
    return Placement()


def first_host(node_list: str) -> str:
    """The first host of Slurm's compressed node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if not match:
        raise ConfigError(f"cannot read the node list {node_list!r}; set MASTER_ADDR to the first node's name")
    return "".join(part or "" for part in match.groups())


class World:
    """All ranks of the run. With one process every collective is the identity."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.rank, self.size, self.local_rank = placement.rank, placement.size, placement.local_rank
        first = placement.rank - placement.local_rank
        self.node_ranks = tuple(range(first, min(first + placement.local_size, placement.size)))
        self.device = device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, in place, same on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value of every rank, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank brings an error: the first such rank its own, all others RemoteError."""
        failed = [rank for rank, message in enumerate(self.gather(error and str(error))) if message is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise RemoteError(f"rank {failed[0]} met an error and reports it")

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises on any, all ranks raise (see `agree`)."""
        value, error = None, None
        try:
            value = action()
        except Exception as failure:
            error = failure
        self.agree(error)
        return cast(T, value)

    def on_first_rank(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 and return its value there, None elsewhere; its error is an error on every rank."""
        return self.together(lambda: action() if self.is_first else None)


def start_world(
    environment: Mapping[str, str] | None = None, collective_timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
) -> World:
    """Join the process group the launcher describes: NCCL on a GPU, gloo on CPU.

    `collective_timeout` is for this class's own collectives; DeepSpeed makes groups of its own, which ignore it.
    """
    placement = placement_from_environment(os.environ if environment is None else environment)
    device = _local_device(placement)
    # DeepSpeed reads the launcher's variables itself; under srun they are ours to set.
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_SIZE=str(placement.local_size),
        MASTER_ADDR=placement.master_address,
        MASTER_PORT=str(placement.master_port),
    )
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore() if placement.size == 1 else None,  # alone, no port is opened that could be taken
            rank=placement.rank,
            world_size=placement.size,
            timeout=collective_timeout,
        )
    return World(placement, device)


def _local_device(placement: Placement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if 1 < count <= placement.local_rank:  # of a single one we cannot tell: Slurm may show each task its own
        raise ConfigError(
            f"rank {placement.rank} is number {placement.local_rank + 1} on its node, which has {count} GPUs; start at "
            f"most {count} ranks a node, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    device = torch.device("cuda", placement.local_rank % count)
    torch.cuda.set_device(device)
    return device


def stop_world() -> None:
    """Leave the group. Uses no collective, so it is safe after an error."""
    if dist.is_initialized():
        dist.destroy_process_group()
