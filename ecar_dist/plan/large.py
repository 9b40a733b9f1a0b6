"""What `ecar-dist plan` prints about a job on many GPUs: traffic, checkpoints, failures, energy; and a simulation.

Rates of storage and failures are assumptions. Options change them, and each line states them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecar_dist.command_line import counted
from ecar_dist.config.run import RunConfig
from ecar_dist.data.fit import local_sets
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.manifest import Manifest
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.memory import checkpoint_bytes, num_emas
from ecar_dist.plan.reliability import (
    GPU_HOURS_A_FAILURE,
    RESTART_SECONDS,
    STORAGE_RATE,
    WATTS,
    best_interval,
    goodput,
    save_times,
    seconds_between_failures,
)
from ecar_dist.plan.simulation import Cluster, simulate_epoch

FEW_IMAGES = 4  # of a rank in a step: with fewer, launches take longer than arithmetic
SHARD_SAMPLES = 4096  # of a set if only its size is given


@dataclass(frozen=True)
class Job:
    """A run on some ranks, and what is assumed about the machines.

    storage: GB/s of a node to and from the storage of data and checkpoints. failure_hours: GPU hours between failures.
    samples: of a set without a manifest. cache_gib: of a node; None: as in the config.
    """

    config: RunConfig
    world_size: int
    device: str
    step_seconds: float
    gpus_per_node: int = 8
    storage: float = STORAGE_RATE
    failure_hours: float = GPU_HOURS_A_FAILURE
    samples: int | None = None
    cache_gib: float | None = None

    @property
    def nodes(self) -> int:
        return math.ceil(self.world_size / self.gpus_per_node)


def large_lines(job: Job) -> list[str]:
    """Traffic, restore, failures and energy, one fact per line."""
    config = job.config
    hours = config.total_steps * job.step_seconds / 3600
    saves = save_times(config, job.world_size, job.step_seconds, job.gpus_per_node, job.storage * 1e9)
    failures = seconds_between_failures(job.world_size, job.failure_hours)
    useful = goodput(saves, failures)
    expected = hours * 3600 / failures / max(useful, 0.01)

    # What the nodes read, for data and for a restore.
    lines = []
    if config.data.images is None:
        size = sample_bytes(config)
        rate = config.batch.global_batch_size / job.step_seconds * size / 1e9
        each = f"{rate / job.nodes:.3g} GB/s for each of {counted(job.nodes, 'node')}"
        lines.append(f"data: {rate:.3g} GB/s in total, {each}, if no shard is read twice ({size:,} bytes per sample)")
    whole = checkpoint_bytes(kind_of(config).parameters(config).total, num_emas(config)) / 1e9
    own = f"{whole / job.nodes:.3g} GB per node, {saves.restore:.3g} s at {job.storage:g} GB/s"
    lines.append(f"restore: {own}; into a different ZeRO stage up to {whole:.3g} GB per node")

    # Failures in that time, and the energy.
    rate_line = f"one in {failures / 3600:.3g} h on {counted(job.world_size, 'GPU')}, each {job.failure_hours:g} h"
    costs = f"{saves.stall:.2g} s per checkpoint and {RESTART_SECONDS:g} s per restart"
    best = f"least time lost with a checkpoint every {best_interval(saves, failures):.3g} s"
    lines.append(f"failures: {rate_line}, {expected:.2g} in this run; goodput {useful:.1%} with {costs}; {best}")
    if watts := next((each for name, each in WATTS.items() if name in job.device.upper()), None):
        energy = hours * job.world_size * watts / 1e6 / max(useful, 0.01)
        lines.append(f"energy: at most {energy:.3g} MWh, at {watts:g} W for each GPU with its share of the node")
    return [f"{line} (forecast)" for line in lines] + few_images(config, job.world_size)


def few_images(config: RunConfig, world_size: int) -> list[str]:
    """A warning, if a rank has few images in a step."""
    batch = config.batch.global_batch_size
    images = batch / world_size
    if images >= FEW_IMAGES or world_size == 1:
        return []
    few = f"gives each of {world_size} ranks {images:g} images per step, too few to keep a GPU busy"
    return [f"warning: batch.global_batch_size={batch} {few}; use fewer ranks or a larger batch"]


def sample_bytes(config: RunConfig) -> int:
    """Bytes of one stored sample, with its tar headers: from the first local set, or from the config's shape."""
    data = config.data
    for _, manifest in local_sets(config, absent_ok=True):
        assert isinstance(manifest, Manifest)
        return ShardLayout.of(1, manifest.moments_shape, manifest.has_flip).stride
    channels = data.latent_channels * (1 if config.vae.kind in ("dct", "identity") else 2)
    return ShardLayout.of(1, (channels, data.latent_size, data.latent_size), False).stride


def simulation_lines(job: Job) -> list[str]:
    """One epoch of the run, simulated. Raises ConfigError if the size of the data is not known."""
    config = job.config
    counts, sizes = data_shape(job)
    batch = config.batch.global_batch_size
    stream = SampleStream(
        counts,
        seed=config.run.seed,
        global_batch_size=batch,
        weights=[source.weight for source in config.data.latent_sources] or [1.0],
        by_step=config.data.mixture_by == "step" and len(counts) > 1,
        lanes=config.data.lanes,
        window_shards=config.data.window_shards,
    )
    gpus = min(job.gpus_per_node, job.world_size)
    if job.world_size % gpus:
        raise ConfigError(f"--world-size {job.world_size} is not a multiple of {gpus} GPUs per node; change one")
    if batch > stream.count:
        raise ConfigError(f"the data has {stream.count} samples, fewer than a batch of {batch}; give more --samples")

    # The cluster and its epoch.
    gib = config.data.cache.gib if job.cache_gib is None else job.cache_gib
    failures = seconds_between_failures(job.world_size, job.failure_hours)
    cache = None if gib is None else int(gib * 2**30)
    cluster = Cluster(job.nodes, gpus, job.storage * 1e9, cache, failures)
    saves = save_times(config, job.world_size, job.step_seconds, job.gpus_per_node, job.storage * 1e9)
    epoch = simulate_epoch(stream, sizes, batch, cluster, job.step_seconds, saves, seed=config.run.seed)

    # Its times, and the bytes.
    size = f"{stream.count:,} samples in {sum(map(len, counts)):,} shards"
    ranks = f"{counted(job.nodes, 'node')} x {counted(gpus, 'rank')}"
    limit = "without a limit" if gib is None else f"of {gib:g} GiB"
    machines = f"{job.storage:g} GB/s per node, a cache {limit}, one failure in {failures / 3600:.3g} h"
    fetched = f"{epoch.fetched / 1e9:.4g} GB by all nodes, {epoch.fetched / epoch.needed:.3f} times the set"
    saving = f"{epoch.save_stall:.3g} s for {counted(epoch.saves, 'save')}"
    failing = f"{epoch.lost:.3g} s for {counted(epoch.failures, 'failure')}"
    return [
        f"simulation of one epoch: {size}, {epoch.steps:,} steps of {job.step_seconds:.3g} s on {ranks}; {machines}",
        f"  bytes fetched: {fetched}",
        f"  stalls: {epoch.data_stall:.3g} s for data, {saving}, {failing}",
        f"  time: {epoch.seconds / 3600:.3g} h, goodput {epoch.goodput:.1%}",
    ]


def data_shape(job: Job) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Samples and bytes of each shard of each source, from the manifests or from `samples`. Raises ConfigError."""
    config = job.config
    if config.data.images is not None:
        raise ConfigError("--simulate models the traffic of latents, not of images; give a config with data.latents")
    if job.samples is not None:
        number = len(config.data.latent_sources)
        shards = max(1, job.samples // number // SHARD_SAMPLES)
        counts = [np.full(shards, SHARD_SAMPLES)] * number
        return counts, [each * sample_bytes(config) for each in counts]

    found = local_sets(config, absent_ok=True)
    if len(found) < len(config.data.latent_sources):
        raise ConfigError("--simulate needs the manifests of the data in local folders; give --samples N instead")
    manifests = [manifest for _, manifest in found if isinstance(manifest, Manifest)]
    return [manifest.counts for manifest in manifests], [_sizes(manifest) for manifest in manifests]


def _sizes(manifest: Manifest) -> np.ndarray:
    entries: Sequence = manifest.shards
    return np.array([entry.bytes for entry in entries], dtype=np.int64)
