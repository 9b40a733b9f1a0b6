"""What a training asks Slurm for."""

from __future__ import annotations

from dataclasses import dataclass

from ecar_dist.cluster.job_script import Options, parse_option
from ecar_dist.errors import ConfigError

_SAID_BY = {  # options of sbatch that the plan hangs on, and how they are given
    "nodes": "--nodes",
    "ntasks-per-node": "--ranks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "time": "--time",
    "array": "--chain",
    "dependency": "--after",
    "output": "nothing: logs lie in the run directory",
    "chdir": "a cd before it",
}


@dataclass(frozen=True)
class Resources:
    """What a training asks Slurm for. None leaves the job script's own line."""

    nodes: int
    min_nodes: int | None = None
    gpus_per_node: int = 8
    ranks_per_node: int | None = None  # None: one a GPU
    cpus_per_rank: int | None = None
    time: str | None = None
    chain: int | None = None  # jobs in a row, for sites that allow no requeue
    sbatch: tuple[str, ...] = ()  # further options of sbatch, e.g. --partition=gpu

    def __post_init__(self) -> None:
        """Raises ConfigError where two of them contradict each other."""
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ConfigError("--gpus-per-node 0 needs --ranks-per-node; give the number of processes on a node")
        if self.fewest > self.nodes:
            raise ConfigError(f"--min-nodes {self.fewest} is above --nodes {self.nodes}; give at most that")
        for name in self.further:
            if name in _SAID_BY:
                raise ConfigError(f"--sbatch=--{name} contradicts the plan; say it with {_SAID_BY[name]}")

    @property
    def ranks(self) -> int:
        """On one node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def fewest(self) -> int:
        return self.min_nodes or self.nodes

    @property
    def further(self) -> dict[str, str]:
        return dict(parse_option(text) for text in self.sbatch)

    def options(self) -> Options:
        """As options of sbatch for train.sbatch."""
        chosen: dict[str, str | None] = {
            "nodes": f"{self.nodes}" if self.fewest == self.nodes else f"{self.fewest}-{self.nodes}",
            "ntasks-per-node": f"{self.ranks}",
            "gpus-per-node": f"{self.gpus_per_node}" if self.gpus_per_node else None,
        }
        if self.cpus_per_rank:
            chosen["cpus-per-task"] = f"{self.cpus_per_rank}"
        if self.time:
            chosen["time"] = self.time
        if self.chain:
            chosen["array"] = f"1-{self.chain}%1"
        return {**chosen, **self.further}
