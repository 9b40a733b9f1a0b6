"""Check within seconds that all nodes are fit to train, before anything is allocated.

Every rank checks its device, its versions, its disks, its clock and the beginning of the data, all within a time
limit, and reports what it found (`roll_call`). Rank 0 decides which nodes are unfit; then all ranks measure one
all-reduce. The result is printed in a few lines, and written to $ECAR_JOB_LOGS/preflight.json if a job script sets this
folder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ecar_dist import __version__
from ecar_dist.errors import NodeError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.placement import job_logs
from ecar_dist.runtime.start.report import different_versions, report, report_lines
from ecar_dist.runtime.start.roll_call import Answer, Answers, Decision, decide, describe, hold_roll_call
from ecar_dist.runtime.world import World
from ecar_dist.storage.atomic import write_json

T = TypeVar("T")
Facts = dict[str, Any]  # JSON values

APPEARS_SECONDS = 60.0  # until a new folder must be visible on other nodes
ALL_REDUCE_SECONDS = 300.0  # includes setting up all connections
ALL_REDUCE_BYTES, ALL_REDUCE_REPEATS = 16 << 20, 3
_SIDE = 256  # of the matrices that the device multiplies


def preflight(
    world: World, folders: Mapping[str, Path], read: Callable[[], tuple[T, Facts]], *, seconds: float
) -> tuple[T, list[str]]:
    """Check every node. Returns what `read` returned on this rank, and the lines that rank 0 may print. Collective.

    folders: what needs free space, by its name in messages. read: reads some of the data and reports how that went. A
    rank that takes longer than `seconds` is unfit. Raises on all ranks like `hold_roll_call`: NodeError if some nodes
    are unfit, a rank's own error if all are.
    """
    began = time.monotonic()
    facts = Facts(clock=world.met)
    found = []

    def look() -> Iterator[str]:
        yield "checking the versions"
        facts.update(versions=versions(), driver=driver())
        yield "computing on the device"
        facts.update(device=try_device(world.device))
        yield "checking the disks"
        facts.update(free=free_space(folders))
        yield "reading the data"
        failpoint("preflight.read")
        value, facts["read"] = read()
        found.append(value)

    answers: list[Answer] = []  # on rank 0

    def rule(heard: Answers) -> Decision:
        answers.extend(answer for answer in heard if answer is not None)
        return decide(heard, seconds=seconds, nodes_by_rank=world.nodes, mismatch=different_versions)

    # first each rank on its own, then all together
    error = _run_within(seconds, look)
    answer = Answer(world.rank, world.nodes[world.rank], describe(error) if error else "", dict(facts))
    hold_roll_call(world, "preflight", answer, rule, seconds=seconds + 10, error=error)
    bandwidth = _bandwidth(world)
    if not world.is_first:
        return found[0], []

    result = report(answers, bandwidth, ALL_REDUCE_BYTES, time.monotonic() - began)
    if folder := job_logs():
        with contextlib.suppress(OSError):
            write_json(folder / "preflight.json", result)
    return found[0], report_lines(result)


def versions() -> Facts:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {
        "ecar_dist": __version__,
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "nccl": nccl,
    }


def driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text()):
            return found[0]
    return None


def try_device(device: torch.device) -> str:
    """The name of the device, after it has multiplied two matrices of small integers, exact in any precision.

    Raises NodeError if the product is wrong.
    """
    failpoint("preflight.device")
    numbers = torch.arange(_SIDE * _SIDE, dtype=torch.float64).view(_SIDE, _SIDE)
    left = numbers % 7
    right = numbers % 5
    product = (left.to(device, torch.float32) @ right.to(device, torch.float32)).cpu().double()
    if not torch.equal(product, left @ right):
        raise NodeError(f"{device} computes a wrong product of integers")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def free_space(folders: Mapping[str, Path]) -> Facts:
    """Free bytes, by name. Raises OSError if a folder is not writable, or if the job's folder does not appear."""
    if (logs := job_logs()) and not _appears(logs):
        raise FileNotFoundError(f"{logs} is not visible from this node: its file system is not mounted")
    free = {}
    for name, folder in folders.items():
        at = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        if not os.access(at, os.W_OK):
            raise PermissionError(f"cannot write to {at}")
        free[name] = shutil.disk_usage(at).free
    return free


def _appears(folder: Path) -> bool:
    until = time.monotonic() + APPEARS_SECONDS
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _run_within(seconds: float, steps: Callable[[], Iterator[str]]) -> Exception | None:
    """Run `steps`, which yields each step's name before it runs. Returns the error that ended them, even a timeout.

    Uses a thread, because a read from a hanging file system cannot be stopped, only abandoned.
    """
    current = [""]
    errors = []

    def run() -> None:
        try:
            for step in steps():
                current[0] = step
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return NodeError(f"{current[0]} took more than {seconds:g} s")
    return errors[0] if errors else None


def _bandwidth(world: World) -> float | None:
    """Bus bandwidth of an all-reduce in bytes per second, as NCCL's tests count it; None for one rank.

    Raises NodeError if it takes too long.

    Each byte crosses a rank's link 2 (n-1)/n times, whatever the algorithm (nccl-tests, doc/PERFORMANCE.md).
    """
    if world.size == 1:
        return None
    taken: list[float] = []

    def measure() -> Iterator[str]:
        yield f"an all-reduce of {ALL_REDUCE_BYTES >> 20} MiB over {world.size} ranks"
        taken.append(world.all_reduce_seconds(ALL_REDUCE_BYTES, ALL_REDUCE_REPEATS))

    if error := _run_within(ALL_REDUCE_SECONDS, measure):
        raise error
    return 2 * (world.size - 1) / world.size * ALL_REDUCE_BYTES / taken[0]
