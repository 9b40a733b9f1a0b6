"""The nodes and GPUs of a training run, and the numbers of nodes over which its batch divides evenly."""

from __future__ import annotations

from dataclasses import dataclass

from ecar_dist.cluster.job_script import Options, parse_option
from ecar_dist.config.batch import divides, mismatch
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError

# Options of sbatch that the plan depends on -> the option of `submit` to use instead.
_INSTEAD_OF = {
    "nodes": "--nodes",
    "ntasks-per-node": "--ranks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "time": "--time",
    "array": "--chain",
    "dependency": "--after",
    "output": "nothing: logs are in the run directory",
    "chdir": "a cd before it",
}


@dataclass(frozen=True)
class Resources:
    """What a training run requests from Slurm. None keeps the option of the job script."""

    nodes: int
    min_nodes: int | None = None
    gpus_per_node: int = 8
    ranks_per_node: int | None = None  # None: one per GPU
    cpus_per_rank: int | None = None
    time: str | None = None
    chain: int | None = None  # jobs in a row, for sites that do not allow requeueing
    sbatch: tuple[str, ...] = ()  # further options of sbatch, e.g. --partition=gpu

    def __post_init__(self) -> None:
        """Raises ConfigError if two of the options contradict each other."""
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ConfigError("--gpus-per-node 0 needs --ranks-per-node; give the number of processes on a node")
        if self.fewest > self.nodes:
            raise ConfigError(f"--min-nodes {self.fewest} is above --nodes {self.nodes}; give at most {self.nodes}")
        for name in self.further:
            if name in _INSTEAD_OF:
                raise ConfigError(f"--sbatch=--{name} would contradict the plan; use {_INSTEAD_OF[name]}")

    @property
    def ranks(self) -> int:
        """Ranks on one node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def fewest(self) -> int:
        """The smallest number of nodes to start on."""
        return self.min_nodes or self.nodes

    @property
    def further(self) -> dict[str, str]:
        """The further options of sbatch by name."""
        return dict(parse_option(text) for text in self.sbatch)

    def options(self) -> Options:
        """Options of sbatch for train.sbatch."""
        # These options determine the number of ranks, so they always replace those of the script.
        chosen: dict[str, str | None] = {
            "nodes": f"{self.nodes}" if self.fewest == self.nodes else f"{self.fewest}-{self.nodes}",
            "ntasks-per-node": f"{self.ranks}",
            "gpus-per-node": f"{self.gpus_per_node}" if self.gpus_per_node else None,
        }

        # Without these, the script's own apply.
        if self.cpus_per_rank:
            chosen["cpus-per-task"] = f"{self.cpus_per_rank}"
        if self.time:
            chosen["time"] = self.time
        if self.chain:
            chosen["array"] = f"1-{self.chain}%1"
        return {**chosen, **self.further}


def usable_nodes(config: RunConfig, nodes: int, ranks_per_node: int) -> int:
    """The largest number of nodes, at most `nodes`, over which the global batch divides evenly.

    Raises ConfigError if there is none.
    """
    return usable_counts(config, 1, nodes, ranks_per_node)[-1]


def usable_counts(config: RunConfig, at_least: int, at_most: int, ranks_per_node: int) -> list[int]:
    """All numbers of nodes from `at_least` to `at_most` over which the global batch divides evenly, smallest first.

    Raises ConfigError if there is none.
    """
    total = config.batch.global_batch_size
    micro = config.batch.micro_batch_size
    counts = [nodes for nodes in range(at_least, at_most + 1) if divides(total, micro, nodes * ranks_per_node)]
    if counts:
        return counts

    problem = mismatch(total, micro, at_least * ranks_per_node)
    given = f"{at_least}" if at_least == at_most else f"{at_least} to {at_most}"
    raise ConfigError(f"on {given} nodes of {ranks_per_node} ranks: {problem}, or use another number of nodes or ranks")


def startable_counts(config: RunConfig, resources: Resources) -> list[int]:
    """Numbers of nodes that the run may start on, in increasing order.

    Raises ConfigError if the full number of nodes is not among them.
    """
    usable_counts(config, resources.nodes, resources.nodes, resources.ranks)
    return usable_counts(config, resources.fewest, resources.nodes, resources.ranks)
