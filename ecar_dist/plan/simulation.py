"""`ecar-dist plan CONFIG --simulate`: one epoch of a run, with the real order of its samples and a model of the rest.

The shards that each node downloads, and when, come from the plans of the loader (`data/loader.py`): the same blocks of
steps, the same look-ahead, the same cache policy. What is modelled:

    network     each node downloads its shards one after the other, in the order of their first use, at a fixed rate
    training    a step takes the seconds of the forecast (`duration.py`); a block of steps waits for all shards of the
                windows that it reads, which is more than its first step needs
    saves       as in `reliability.py`: a stall at each interval; writing takes time, but training continues
    failures    at random times (exponential, seeded). Each costs the work since the last complete checkpoint, the
                restart and the restore, and one node comes back with an empty cache

Only some nodes are simulated; all nodes wait for the slowest of these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ecar_dist.data.order.stream import SampleStream
from ecar_dist.plan.reliability import RESTART_SECONDS, SaveTimes

MAX_BLOCK = 16384  # positions of a rank that the loader locates together
WALKED = 4  # nodes that are simulated, at most


@dataclass(frozen=True)
class Cluster:
    """Nodes and their rates. `network` is in bytes/s of a node; `cache` in bytes of a node, None without a limit."""

    nodes: int
    gpus_per_node: int
    network: float
    cache: int | None
    failures: float  # seconds between failures of the whole job

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass
class Epoch:
    """The times and traffic of one epoch. Bytes are of all nodes, seconds of the job."""

    steps: int = 0
    training: float = 0.0  # of steps only
    data_stall: float = 0.0
    save_stall: float = 0.0
    lost: float = 0.0  # work that was repeated, restarts and restores
    saves: int = 0
    failures: int = 0
    fetched: float = 0.0
    needed: float = 0.0

    @property
    def seconds(self) -> float:
        return self.training + self.data_stall + self.save_stall + self.lost

    @property
    def goodput(self) -> float:
        return self.training / self.seconds


@dataclass
class NodeTraffic:
    """The cache of one node and its queue of downloads.

    sizes: bytes of each shard of each source. budget: bytes of the cache for each source, None without a limit.
    """

    sizes: Sequence[np.ndarray]
    budget: int | None
    fetched: float = 0.0  # bytes so far
    cached: dict[tuple[int, int], float] = field(default_factory=dict)  # bytes, by source and shard
    queue: dict[tuple[int, int], float] = field(default_factory=dict)  # bytes left, in the order of first use

    def request(self, soon: Sequence[Sequence[int]], future: Sequence[Mapping[int, int]]) -> None:
        """Like a source's plan: make room, then request the shards of `soon` that are missing.

        future: for each source, the position of each shard in the order of next use. Empty without a budget.
        """
        for source, shards in enumerate(soon):
            order = future[source] if self.budget is not None else {}
            for shard in shards:
                key = (source, shard)
                if key not in self.cached and key not in self.queue and self._fits(source, shard, order):
                    self.queue[key] = float(self.sizes[source][shard])
            self._evict(source, order)

    def transfer(self, nbytes: float) -> None:
        """Download `nbytes` bytes of the queue, in order."""
        while self.queue and nbytes > 0:
            key, left = next(iter(self.queue.items()))
            part = min(left, nbytes)
            nbytes -= part
            self.queue[key] = left - part
            if left <= part:
                self._arrived(key)

    def complete(self, now: Sequence[Sequence[int]]) -> float:
        """Download the missing shards of `now`; returns the bytes that were still missing."""
        wanted = {(source, shard) for source, shards in enumerate(now) for shard in shards}
        for source, shard in sorted(wanted - self.cached.keys() - self.queue.keys()):  # evicted, or did not fit
            self.queue[source, shard] = float(self.sizes[source][shard])
        waited = 0.0
        for key in [key for key in self.queue if key in wanted]:
            waited += self.queue[key]
            self._arrived(key)
        return waited

    def _arrived(self, key: tuple[int, int]) -> None:
        size = float(self.sizes[key[0]][key[1]])
        del self.queue[key]
        self.cached[key] = size
        self.fetched += size

    def _fits(self, source: int, shard: int, order: Mapping[int, int]) -> bool:
        """Whether the budget holds the shards up to this one: later ones would evict earlier ones."""
        if self.budget is None:
            return True
        largest = float(self.sizes[source].max())
        return shard in order and (order[shard] + 1) * largest <= self.budget

    def _evict(self, source: int, order: Mapping[int, int]) -> None:
        """Drop the shards whose next use is furthest away, until the others fit into the budget."""
        if self.budget is None:
            return
        mine = [key for key in self.cached if key[0] == source]
        total = sum(self.cached[key] for key in mine)
        for key in sorted(mine, key=lambda key: order.get(key[1], len(order)), reverse=True):
            if total <= self.budget:
                return
            total -= self.cached.pop(key)


def simulate_epoch(
    stream: SampleStream,
    sizes: Sequence[np.ndarray],
    batch: int,
    cluster: Cluster,
    step_seconds: float,
    saves: SaveTimes,
    *,
    seed: int = 0,
) -> Epoch:
    """Simulate the first epoch, from an empty cache. `sizes`: bytes of each shard of each source."""
    walked = sorted({round(part * (cluster.nodes - 1) / max(1, WALKED - 1)) for part in range(WALKED)})
    nodes = {node: NodeTraffic(sizes, cluster.cache) for node in walked}
    epoch = Epoch(needed=float(sum(each.sum() for each in sizes)))
    chance = random.Random(seed)
    next_failure = chance.expovariate(1 / cluster.failures)
    since_save = 0.0

    for begin, end, soon in blocks(stream, batch, cluster.world_size):
        # All nodes wait for the slowest one.
        slowest = 0.0
        for node, traffic in nodes.items():
            plan_node(stream, traffic, node, cluster, begin, soon)
            waited = traffic.complete(_shards(stream, begin, end, node, cluster))
            slowest = max(slowest, waited / cluster.network)
        epoch.data_stall += slowest

        # The steps of the block and its saves; downloads continue meanwhile.
        steps = (end - begin) // batch
        training = steps * step_seconds
        count, since_save = divmod(since_save + training, saves.between)
        stall = count * saves.stall
        for traffic in nodes.values():
            traffic.transfer((training + stall) * cluster.network)
        epoch.steps += steps
        epoch.training += training
        epoch.saves += int(count)
        epoch.save_stall += stall

        # A failure loses what is not in a complete checkpoint, and one node's cache.
        while next_failure < epoch.seconds:
            epoch.failures += 1
            epoch.lost += chance.uniform(0, saves.between) + saves.write + RESTART_SECONDS + saves.restore
            epoch.fetched += sum(nodes[chance.choice(walked)].cached.values()) if cluster.cache else 0.0
            next_failure += chance.expovariate(1 / cluster.failures)

    epoch.fetched += sum(traffic.fetched for traffic in nodes.values()) * cluster.nodes / len(walked)
    return epoch


def blocks(stream: SampleStream, batch: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """The blocks of whole steps that a loader plans together, for one epoch: begin, end, and end of the look-ahead.

    A loader also looks ahead into the next epoch, whose traffic is not counted here.
    """
    size = min(MAX_BLOCK * world_size, stream.window // 2)
    steps = max(1, size // batch)
    last = max(1, stream.count // batch) * batch
    for begin in range(0, last, steps * batch):
        soon = max(begin + stream.window, begin + (steps + 1) * batch)
        yield begin, min(begin + steps * batch, last), min(soon, last)


def plan_node(stream: SampleStream, traffic: NodeTraffic, node: int, cluster: Cluster, begin: int, soon: int) -> None:
    """Request what the ranks of a node plan before a block: see SampleLoader."""
    future: list[dict[int, int]] = []
    if traffic.budget is not None:
        later = _shards(stream, begin, begin + stream.count, node, cluster)
        future = [{shard: use for use, shard in enumerate(shards)} for shards in later]
    traffic.request(_shards(stream, begin, soon, node, cluster), future)


def _shards(stream: SampleStream, begin: int, end: int, node: int, cluster: Cluster) -> list[list[int]]:
    """The shards of each source that a node reads in [begin, end), by first use."""
    ranks = range(node * cluster.gpus_per_node, (node + 1) * cluster.gpus_per_node)
    return stream.upcoming(begin, end, ranks, cluster.world_size)
