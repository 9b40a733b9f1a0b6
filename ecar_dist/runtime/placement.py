"""Where the launcher put this process, from the variables of torchrun, deepspeed, srun and the job script."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ecar_dist.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where the launcher put this process; by default a world of one process."""

    rank: int = 0
    size: int = 1  # ranks of the world
    local_rank: int = 0
    local_size: int = 1  # ranks of this node
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
            local_size=tasks_on_node(
                environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(environment.get("SLURM_NODEID", 0))
            ),
            master_address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            master_port=int(environment.get("MASTER_PORT") or port_of_job(environment)),
        )
    return Placement()


def threads_of_rank(environment: Mapping[str, str], local_size: int, cores: int) -> int | None:
    """Threads for torch on the CPU: the rank's share of the `cores` that this process may use.

    None if OMP_NUM_THREADS has been set: by the user, by torchrun (1 for several ranks) or by the job script.
    """
    return None if environment.get("OMP_NUM_THREADS") else max(1, cores // local_size)


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks of node number `node`, from Slurm's compressed list: in `8(x2),4` the first two nodes have 8 tasks each.

    For a node beyond the list, the last number counts.
    """
    counts = []
    for part in tasks_per_node.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def port_of_job(environment: Mapping[str, str]) -> int:
    """The rendezvous port of a Slurm step: the same on all nodes, a different one in each attempt and step.

    In 20000..31999, below the ports that Linux gives to outgoing connections (from 32768).
    """
    job, restarts, step = (int(environment.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return 20000 + (job + 7919 * restarts + 5003 * step) % 12000


def first_host(node_list: str) -> str:
    """The first host of Slurm's compressed node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if not match:
        raise ConfigError(f"cannot read the node list {node_list!r}; set MASTER_ADDR to the first node's name")
    return "".join(part or "" for part in match.groups())


def node_name() -> str:
    """Slurm's name for this node, which its exclude list needs; else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_nodes(size: int) -> tuple[str, ...]:
    """The node of each rank, if the job script lists the nodes; else empty. All nodes have the same number of ranks."""
    nodes = os.environ.get("ECAR_JOB_NODES", "").split(",")
    return tuple(nodes[rank * len(nodes) // size] for rank in range(size)) if all(nodes) else ()


def job_logs() -> Path | None:
    """The folder where ranks leave files for their job script; None without a job script."""
    folder = os.environ.get("ECAR_JOB_LOGS")
    return Path(folder) if folder else None


def allow_many_files() -> None:
    """Raise the limit on open files, which is 1,024 by default on many systems.

    Each mapped shard uses one, and on rank 0 the rendezvous uses one for each rank of the job.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # if it is refused, the limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
