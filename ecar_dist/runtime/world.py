"""Which process this is, and the few collectives the rest of the code needs. The one home of torch.distributed."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ecar_dist.errors import ConfigError, NodeError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import Placement, job_nodes, node_name, placement_from_environment
from ecar_dist.runtime.start.roll_call import Answer, Verdict, describe, hold_roll_call, judge_nodes

T = TypeVar("T")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
MEETING_SECONDS = 300.0  # for all ranks to come, from the time the first one is there
_VERDICT_SECONDS = 30.0  # for rank 0's verdict, once its own time is over
_HEARD_SECONDS = 10.0  # for the others to hear it
_LONGEST_POLL = 0.25  # seconds
# Of the job, the attempt and the step: two jobs that meet at one port by mistake must not take each other for one.
_IDENTITY = (
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)


class World:
    """All ranks of the run. With one process every collective is the identity."""

    def __init__(self, placement: Placement, device: torch.device, store: dist.Store | None = None) -> None:
        self._store = store
        self.rank, self.size, self.local_rank = placement.rank, placement.size, placement.local_rank
        first = placement.rank - placement.local_rank
        self.node_ranks = tuple(range(first, min(first + placement.local_size, placement.size)))
        self.device = device
        self.nodes = (node_name(),) * placement.size  # of every rank; `start_world` asks them
        self.met = time.time()  # when all had come, by this node's clock

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, in place, same on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def of_each(self, values: torch.Tensor) -> list[list[int]]:
        """The int64 [n] of every rank, by rank, on all ranks: one sum over ranks, one read of the device."""
        rows = torch.zeros(self.size, len(values), dtype=torch.int64, device=self.device)
        rows[self.rank] = values
        return self.sum(rows).tolist()

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value of every rank, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def roll_call(self, name: str, text: str, seconds: float, judge: Callable[[Sequence[str | None]], str]) -> str:
        """Rank 0's verdict on every rank's `text`, None where there was none in so many seconds; on all ranks.

        No collective, but keys in the store, so it ends in time whoever hangs, and before there is a group. `name` is
        new in every call. Raises RemoteError where rank 0 is silent or gone.
        """
        if self.size == 1:
            return judge([text])
        assert self._store is not None, "this world has no store"
        answers, heard = ([f"{name}/{what}/{rank}" for rank in range(self.size)] for what in ("answer", "heard"))
        store, verdict = self._store, f"{name}/verdict"
        try:
            store.set(answers[self.rank], text)
            if not self.is_first:
                if not _await_keys(store, [verdict], seconds + _VERDICT_SECONDS):
                    raise RemoteError(f"rank 0 gave no verdict within {seconds + _VERDICT_SECONDS:g} s", again=True)
                said = store.get(verdict).decode()
                store.set(heard[self.rank], "")
                return said
            _await_keys(store, answers, seconds)
            came = [store.check([key]) for key in answers]
            said = judge([store.get(key).decode() if here else None for key, here in zip(answers, came, strict=True)])
            store.set(verdict, said)
            # The store is this process's, which may end now.
            _await_keys(store, [key for key, here in zip(heard, came, strict=True) if here][1:], _HEARD_SECONDS)
            return said
        except dist.DistError as error:
            raise RemoteError("rank 0 is gone", again=True) from error

    def all_reduce_seconds(self, nbytes: int, repeats: int) -> float:
        """Seconds that one all-reduce of so many bytes takes, on average, after a first that opens connections."""
        values = torch.zeros(nbytes // 4, device=self.device)
        self.sum(values)
        self._finish()
        began = time.perf_counter()
        for _ in range(repeats):
            self.sum(values)
        self._finish()
        return (time.perf_counter() - began) / repeats

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank brings an error: the first such rank its own, all others RemoteError."""
        failed = [rank for rank, message in enumerate(self.gather(error and str(error))) if message is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise RemoteError(f"rank {failed[0]} met an error and reports it")

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises on any, all ranks raise (see `agree`)."""
        value, error = None, None
        try:
            value = action()
        except Exception as failure:
            error = failure
        self.agree(error)
        return cast(T, value)

    def on_first_rank(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 and return its value there, None elsewhere; its error is an error on every rank."""
        return self.together(lambda: action() if self.is_first else None)


def start_world(
    environment: Mapping[str, str] | None = None, collective_timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
) -> World:
    """Meet all ranks that the launcher describes, then join their process group: NCCL on a GPU, gloo on CPU.

    `collective_timeout` is for this class's own collectives; DeepSpeed makes groups of its own, which ignore it.
    Raises NodeError, in one line, where the port is taken, ranks do not come, or some nodes have no usable GPU.
    """
    environment = dict(os.environ if environment is None else environment)
    placement = placement_from_environment(environment)
    # DeepSpeed reads the launcher's variables itself; under srun they are ours to set.
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_SIZE=str(placement.local_size),
        MASTER_ADDR=placement.master_address,
        MASTER_PORT=str(placement.master_port),
    )
    store = _open_store(placement, environment)
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


def _open_store(placement: Placement, environment: Mapping[str, str]) -> dist.Store:
    """Where the ranks meet: rank 0's, or that of torchrun's agent, which holds the port. Raises NodeError."""
    if placement.size == 1:
        return dist.HashStore()  # alone, no port is opened that could be taken
    hosts = placement.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout, where = datetime.timedelta(seconds=MEETING_SECONDS), f"{placement.master_address}:{placement.master_port}"
    try:
        store = dist.TCPStore(
            placement.master_address, placement.master_port, None, hosts, timeout, wait_for_workers=False
        )
    except (dist.DistError, ValueError) as error:
        said = (str(error) or "no reason given").splitlines()[0]
        if "EADDRINUSE" in said:
            raise NodeError(
                f"{where} is taken by another process; run the same command again: a Slurm job gets another port in "
                f"its next attempt, elsewhere set MASTER_PORT (torchrun, deepspeed: --master-port) to a free one"
            ) from None
        role = "open the meeting point" if hosts else "reach rank 0"
        raise NodeError(
            f"rank {placement.rank} on {node_name()} cannot {role} at {where} ({said.rstrip('.')}); see to it that "
            f"{placement.master_address} is the first node's name or address, then run the same command again"
        ) from None
    return dist.PrefixStore("ecar/" + "/".join(environment.get(name, "") for name in _IDENTITY), store)


def _meet(placement: Placement, store: dist.Store) -> World:
    """All ranks, once each is there with the same kind of device. Raises as `hold_roll_call` on all of them."""
    device, error = torch.device("cpu"), None
    try:
        device = _local_device(placement)
    except (ConfigError, RuntimeError) as failure:
        error = failure
    world = World(placement, device, store)
    answer = Answer(placement.rank, node_name(), describe(error) if error else "", {"device": device.type})
    judge = partial(_judge_meeting, seconds=MEETING_SECONDS)
    world.nodes = hold_roll_call(world, "meeting", answer, judge, seconds=MEETING_SECONDS, error=error).nodes
    world.met = time.time()
    return world


def _judge_meeting(answers: Sequence[Answer | None], *, seconds: float) -> Verdict:
    """As `judge_nodes`; where some have a GPU, a node without one is unfit."""
    kinds = {answer.facts["device"] for answer in answers if answer and not answer.problem}
    if len(kinds) > 1:
        none = "it has no GPU that torch can use, others have"
        answers = [
            dataclasses.replace(answer, problem=none)
            if answer and not answer.problem and answer.facts["device"] == "cpu"
            else answer
            for answer in answers
        ]
    return judge_nodes(answers, seconds=seconds, came=job_nodes(len(answers)))


def _await_keys(store: dist.Store, keys: Sequence[str], seconds: float) -> bool:
    """Whether all were set in time. Polled: `store.wait` would keep signals out, and fills stderr when it gives up."""
    until, pause = time.monotonic() + seconds, 0.005
    while not store.check(list(keys)):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(_LONGEST_POLL, 1.5 * pause)
    return True


def _local_device(placement: Placement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if 1 < count <= placement.local_rank:  # of a single one we cannot tell: Slurm may show each task its own
        raise ConfigError(
            f"rank {placement.rank} is number {placement.local_rank + 1} on its node, which has {count} GPUs; start at "
            f"most {count} ranks a node, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    device = torch.device("cuda", placement.local_rank % count)
    torch.cuda.set_device(device)
    return device


def stop_world() -> None:
    """Leave the group. Uses no collective, so it is safe after an error."""
    if dist.is_initialized():
        dist.destroy_process_group()
