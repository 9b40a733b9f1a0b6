"""Bytes downloaded in an epoch, divided by the bytes of the set: planned for a large set, measured on a small one."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import contenders
import growth

RANKS_PER_NODE = 8
PLANNED_SHARDS = 313  # 1.28 million samples
MEASURED_SHARDS = 32
_START_UP_TRIES = 300  # one every 0.1 s
_STORE = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


def planned_traffic(nodes: tuple[int, ...]) -> dict[int, float]:
    """Shards that all nodes together download in an epoch of a large set, divided by the shards of the set.

    Computed from the order alone, by number of nodes. The ratio is 1 if each shard goes to one node only. Each node is
    assumed to keep its shards for the whole epoch.
    """
    from ecar_dist.data.order.stream import SampleStream

    counts = [contenders.SHARD_SAMPLES] * PLANNED_SHARDS
    fetched = {}
    for number in nodes:
        world = number * RANKS_PER_NODE
        batch = math.lcm(contenders.BATCH, world)
        stream = SampleStream([counts], seed=contenders.SEED, global_batch_size=batch)
        shares = [range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE) for node in range(number)]
        touched = [stream.upcoming(0, stream.count, tuple(ranks), world)[0] for ranks in shares]
        fetched[number] = sum(map(len, touched)) / PLANNED_SHARDS
    return fetched


def measured_traffic(work: Path, nodes: tuple[int, ...]) -> dict[int, float] | None:
    """The same ratio in bytes, measured in an epoch of a small set from an S3 server, by simulated one-rank nodes.

    The bytes are those of the transfer counters. None if moto is not installed.
    """
    if importlib.util.find_spec("moto") is None:
        return None
    from data_tools.push import push

    small = work / "remote_set"
    growth.write_part_of_set(work / contenders.CONTENDERS["ours, small shards"].folder, small, MEASURED_SHARDS)
    needed = sum(path.stat().st_size for path in small.glob("*.tar"))
    with _object_store() as bucket:
        push(small, f"{bucket}/set")
        return {
            number: sum(_epoch_of_node(f"{bucket}/set", work, node, number) for node in range(number)) / needed
            for number in nodes
        }


def _epoch_of_node(url: str, work: Path, node: int, nodes: int) -> float:
    """Bytes that one node with an empty cache downloads for its share of an epoch."""
    with contenders.open_ours(url, work / f"cache_{node}_of_{nodes}", node, nodes) as loader:
        steps = -(-loader.stream.count // (contenders.BATCH * nodes))
        for _ in range(steps):
            next(loader)
        return sum(source.store.stats.snapshot()["bytes"] for source in loader.sources)


@contextlib.contextmanager
def _object_store() -> Iterator[str]:
    """The URL of an empty bucket on a moto server, which runs until the end of the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await(f"{endpoint}/moto-api/")
            os.environ.update(_STORE, AWS_ENDPOINT_URL=endpoint)
            signed = "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request, SignedHeaders=, Signature="
            request = urllib.request.Request(f"{endpoint}/bench", b"", {"Authorization": signed}, method="PUT")
            urllib.request.urlopen(request, timeout=30).close()
            yield "s3://bench"
        finally:
            server.kill()


def _await(url: str) -> None:
    for _ in range(_START_UP_TRIES):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")
