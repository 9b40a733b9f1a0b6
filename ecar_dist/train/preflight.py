"""The preflight of a training run. The config determines what it checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ecar_dist.command_line import say
from ecar_dist.config.run import RunConfig
from ecar_dist.data.probe import NO_PROBE
from ecar_dist.runtime.start.agreement import agree_on
from ecar_dist.runtime.start.preflight import preflight
from ecar_dist.runtime.world import World
from ecar_dist.storage.remote import is_remote, local_path
from ecar_dist.storage.retries import RetryPolicy
from ecar_dist.train.sources import TrainingData, cache_options, check_data, try_data

LOCAL_SECONDS = 120.0  # for each rank's checks; a file system that takes longer counts as hung
REMOTE_SECONDS = RetryPolicy().deadline + 60.0  # reads from object stores are retried


def check_nodes(config: RunConfig, world: World) -> TrainingData:
    """Check that every node is fit and sees the same data; rank 0 reports. Returns the data. Collective.

    Every rank reads the manifests. One rank per node reads the beginning of the shards: a thousand ranks that read the
    same bytes past their nodes' caches would be a considerable load. The ranks of a node share the lookup of the
    shards, see `check_data`.

    Raises on all ranks: NodeError if some nodes are unfit, DataError if no node can read the data, ConfigError if the
    nodes see different data.
    """
    on_node = [rank for rank, node in enumerate(world.nodes) if node == world.nodes[world.rank]]
    first_of_node = on_node[0] == world.rank

    def read() -> tuple[TrainingData, dict[str, Any]]:
        data = check_data(config, on_node.index(world.rank), len(on_node))
        probe = try_data(data) if first_of_node else NO_PROBE
        return data, {"where": probe.where, "bytes": probe.nbytes, "seconds": probe.seconds}

    # Check each node by itself.
    seconds = REMOTE_SECONDS if _reads_remotely(config) else LOCAL_SECONDS
    data, lines = preflight(world, folders(config), read, seconds=seconds)
    for line in lines:
        say(line)

    # Compare all nodes with each other.
    agree_on(world, "data", data_facts(config, data), "give every node the same data set; its path may differ")
    return data


def data_facts(config: RunConfig, data: TrainingData) -> dict[str, str]:
    """The id of each data set, by the config key of its path."""
    if config.data.mixture:
        keys = [f"data.mixture[{index}].latents" for index in range(len(data.dataset_ids))]
    else:
        keys = ["data.images" if data.encoder is None else "data.latents"]
    return {f"dataset_id of {key}": found for key, found in zip(keys, data.dataset_ids, strict=True)}


def folders(config: RunConfig) -> dict[str, Path]:
    """The folders that need free space on every node, by their purpose."""
    found = {"for the run": config.run_directory, "in /dev/shm": Path("/dev/shm")}
    if config.checkpoint.dir is not None and not is_remote(config.checkpoint.dir):
        found["for checkpoints"] = local_path(config.checkpoint.dir)
    if _reads_remotely(config):
        found["for the cache"] = cache_options(config.data).folder
    return found


def _reads_remotely(config: RunConfig) -> bool:
    data = config.data
    places = [data.images] if data.images is not None else [source.latents for source in data.latent_sources]
    return any(is_remote(place) for place in places)
