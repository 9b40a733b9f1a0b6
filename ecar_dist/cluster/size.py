"""How many of a job's nodes a run can use: its global batch must divide over their ranks."""

from __future__ import annotations

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
    batch = config.batch
    micro_batches = batch.global_batch_size // batch.micro_batch_size
    counts = [nodes for nodes in range(at_least, at_most + 1) if micro_batches % (nodes * ranks_per_node) == 0]
    if counts:
        return counts
    unit = batch.micro_batch_size * ranks_per_node * at_least
    above = -(-batch.global_batch_size // unit) * unit
    wanted = f"{at_least}" if at_least == at_most else f"any of {at_least} to {at_most}"
    raise ConfigError(
        f"batch.global_batch_size={batch.global_batch_size} is no multiple of micro_batch_size x ranks a node x "
        f"nodes = {batch.micro_batch_size} x {ranks_per_node} x {wanted}; use batch.global_batch_size={above}, "
        "a smaller micro_batch_size, or another number of nodes or ranks"
    )
