"""How many of a job's nodes a run can use: its global batch must divide over their ranks."""

from __future__ import annotations

from ecar_dist.config.batch import divides, mismatch
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError


def usable_nodes(config: RunConfig, nodes: int, ranks_per_node: int) -> int:
    """The largest number of nodes, at most `nodes`, that the global batch divides on.

    Raises ConfigError where there is none: then it does not divide on the ranks of a single node either.
    """
    return usable_counts(config, 1, nodes, ranks_per_node)[-1]


def usable_counts(config: RunConfig, at_least: int, at_most: int, ranks_per_node: int) -> list[int]:
    """All numbers of nodes from `at_least` to `at_most` that the global batch divides on, rising.

    Raises ConfigError where there is none.
    """
    total = config.batch.global_batch_size
    micro = config.batch.micro_batch_size
    counts = [nodes for nodes in range(at_least, at_most + 1) if divides(total, micro, nodes * ranks_per_node)]
    if counts:
        return counts

    problem = mismatch(total, micro, at_least * ranks_per_node)
    given = f"{at_least}" if at_least == at_most else f"{at_least} to {at_most}"
    raise ConfigError(f"on {given} nodes of {ranks_per_node} ranks: {problem}, or use another number of nodes or ranks")
