"""The rendezvous: all ranks that the launcher has started meet in a store, then join a process group."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from ecar_dist.errors import ConfigError, NodeError
from ecar_dist.runtime.placement import (
    Placement,
    allow_many_files,
    job_nodes,
    node_name,
    placement_from_environment,
    threads_of_rank,
)
from ecar_dist.runtime.start.roll_call import Answer, Answers, Decision, decide, describe, hold_roll_call
from ecar_dist.runtime.world import World

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
RENDEZVOUS_SECONDS = 300.0  # for all ranks to join, from the time the first one arrives
# The job, the attempt and the step: two jobs that share a port by mistake must not be taken for one job.
_IDENTITY = (
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)


def start_world(
    environment: Mapping[str, str] | None = None, collective_timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
) -> World:
    """Meet all ranks that the launcher describes, then join their process group: NCCL on a GPU, gloo on CPU.

    `collective_timeout` is for the collectives of World; DeepSpeed creates its own groups, which ignore it.
    Raises NodeError, in one line, if the port is in use, ranks do not join, or some nodes have no usable GPU.
    """
    allow_many_files()  # before the first connection
    environment = dict(os.environ if environment is None else environment)
    placement = placement_from_environment(environment)
    # DeepSpeed reads the launcher's variables itself; srun does not set them.
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_SIZE=str(placement.local_size),
        MASTER_ADDR=placement.master_address,
        MASTER_PORT=str(placement.master_port),
    )
    if threads := threads_of_rank(environment, placement.local_size, len(os.sched_getaffinity(0))):
        torch.set_num_threads(threads)

    store = open_store(placement, environment)
    world = _meet(placement, store)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=placement.rank,
            world_size=placement.size,
            timeout=collective_timeout,
        )
    return world


def stop_world() -> None:
    """Leave the group. Uses no collective, so it is safe after an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def open_store(placement: Placement, environment: Mapping[str, str]) -> dist.Store:
    """The store where the ranks meet: rank 0's, or that of torchrun's agent, which owns the port. Raises NodeError."""
    if placement.size == 1:
        return dist.HashStore()  # opens no port, which might be in use

    # Open or reach the store of all ranks.
    hosts = placement.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{placement.master_address}:{placement.master_port}"
    timeout = datetime.timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        store = dist.TCPStore(
            placement.master_address, placement.master_port, None, hosts, timeout, wait_for_workers=False
        )
    except (dist.DistError, ValueError) as error:
        reason = (str(error) or "no reason given").splitlines()[0]
        if "EADDRINUSE" in reason:
            raise NodeError(
                f"{where} is in use by another process; run the same command again: a Slurm job gets another port in "
                f"its next attempt, otherwise set MASTER_PORT (torchrun, deepspeed: --master-port) to a free one"
            ) from None
        action = "open the rendezvous" if hosts else "reach rank 0"
        raise NodeError(
            f"rank {placement.rank} on {node_name()} cannot {action} at {where} ({reason.rstrip('.')}); make sure that "
            f"{placement.master_address} is the name or address of the first node, then run the same command again"
        ) from None

    # Ranks of another attempt may connect to the same port, so keys begin with the identity of this one.
    return dist.PrefixStore("ecar/" + "/".join(environment.get(name, "") for name in _IDENTITY), store)


def _meet(placement: Placement, store: dist.Store) -> World:
    """The world of all ranks, once all have joined with the same kind of device. Raises like `hold_roll_call`."""
    device = torch.device("cpu")
    error = None
    try:
        device = local_device(placement)
    except (ConfigError, RuntimeError) as failure:
        error = failure

    world = World(placement, device, store)
    answer = Answer(placement.rank, node_name(), describe(error) if error else "", {"device": device.type})
    rule = partial(decide_on_devices, seconds=RENDEZVOUS_SECONDS)
    decision = hold_roll_call(world, "rendezvous", answer, rule, seconds=RENDEZVOUS_SECONDS, error=error)
    world.nodes = decision.nodes
    world.met = time.time()
    return world


def decide_on_devices(answers: Answers, *, seconds: float) -> Decision:
    """As `decide`; if some ranks have a GPU, a node without one is unfit."""
    kinds = {answer.facts["device"] for answer in answers if answer and not answer.problem}
    if len(kinds) > 1:
        answers = [
            dataclasses.replace(answer, problem="it has no GPU that torch can use, others have")
            if answer and not answer.problem and answer.facts["device"] == "cpu"
            else answer
            for answer in answers
        ]
    return decide(answers, seconds=seconds, nodes_by_rank=job_nodes(len(answers)))


def local_device(placement: Placement) -> torch.device:
    """The GPU of this rank, made the current one; else the CPU. Raises ConfigError if a node has too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # a single GPU proves nothing: Slurm may show each task only its own
    if 1 < count <= placement.local_rank:
        raise ConfigError(
            f"rank {placement.rank} is number {placement.local_rank + 1} on its node, which has {count} GPUs; start at "
            f"most {count} ranks per node, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    device = torch.device("cuda", placement.local_rank % count)
    torch.cuda.set_device(device)
    return device
