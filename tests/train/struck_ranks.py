"""Real ranks that stop by themselves at a chosen place, so that a signal reaches them exactly there."""

import json
import os
import re
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from ecar_dist.drills.processes import MARK, POLL_SECONDS, TIDY_SECONDS, Job, marked
from ecar_dist.runtime.checkpoint.files import committed, verify
from tests.conftest import free_port
from tests.fork_server import fork_ranks

BOUND = 30.0  # seconds from a strike to the end of all ranks, as under Slurm
PATIENCE = 120.0  # seconds after which a launch counts as hung
REQUEUE = 75
STEP = re.compile(r"^step (\d+)/", re.MULTILINE)


def launch(config, log, *overrides, ranks=2, failpoint=""):
    """Start `train` on real ranks under the launcher. Returns a Job, to be used as a context manager."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    command += [str(free_port()), "-m", "ecar_dist", "train", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ECAR_FAILPOINT": failpoint}
    return Job(command, environment, log, PATIENCE)


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@dataclass(frozen=True)
class Ended:
    """How ranks without a launcher ended."""

    statuses: list[int]  # by rank; a negative one is a signal
    text: str  # the output of all ranks
    seconds: float  # since the strike, or since the start if there was none
    orphans: list[int]  # processes that they started, and that outlived them


class Struck:
    """`train` on ranks that are forked instead of launched; a context manager that leaves none of them behind."""

    def __init__(self, config, *overrides, ranks=2, failpoint="", before=None):
        self._mark = uuid.uuid4().hex
        more = {"ECAR_FAILPOINT": failpoint, MARK: self._mark}
        self.began = self._struck = time.monotonic()
        words = ("train", str(config), *overrides)
        self.ranks = fork_ranks(ranks, free_port(), *words, more=dict.fromkeys(range(ranks), more), before=before)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for rank in self.ranks:
            rank.process.kill()

    def pid(self, rank):
        return self.ranks[rank].process.pid

    def wait_for(self, happened, what):
        while not happened():
            gone = [rank.process.exitcode for rank in self.ranks]
            late = time.monotonic() - self.began > PATIENCE
            if late or None not in gone:
                raise AssertionError(f"no {what}, statuses {gone}: {''.join(rank.text() for rank in self.ranks)}")
            time.sleep(POLL_SECONDS)

    def reach(self, step):
        """Wait until this step is logged."""
        self.wait_for(lambda: any(int(found) >= step for found in STEP.findall(self.ranks[0].text())), f"step {step}")

    def strike(self, *ranks, signals=(signal.SIGTERM,)):
        """Once a failpoint has stopped these ranks, send all signals to each of them, and let them continue."""
        self.wait_for(lambda: all(is_stopped(self.pid(rank)) for rank in ranks), f"ranks {ranks} at the failpoint")
        self._struck = time.monotonic()
        for number in (*signals, signal.SIGCONT):
            for rank in ranks:
                os.kill(self.pid(rank), number)

    def end(self):
        """Wait until all ranks and their child processes have ended. Remaining processes are reported, and killed."""
        until = self.began + PATIENCE
        while alive := [rank.process.sentinel for rank in self.ranks if rank.process.exitcode is None]:
            assert time.monotonic() < until, "".join(rank.text() for rank in self.ranks)
            wait(alive, 1.0)
        seconds = time.monotonic() - self._struck
        deadline = time.monotonic() + TIDY_SECONDS
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        ended = [rank.end() for rank in self.ranks]
        text = "".join(one.stdout + one.stderr for one in ended)
        return Ended([one.returncode for one in ended], text, seconds, left)


def stop_at(config, failpoint, *overrides, ranks=2, struck=None, signals=(signal.SIGTERM,), before=None):
    """Start, strike the ranks (all, unless `struck` says which) at the failpoint, and wait for the end."""
    whom = range(ranks) if struck is None else struck
    only = f":rank={whom[0]}" if len(whom) == 1 else ""
    site, *conditions = failpoint.split(":")
    point = ":".join([f"{site}{only}", *conditions, "stop"])
    with Struck(config, *overrides, ranks=ranks, failpoint=point, before=before) as job:
        job.strike(*whom, signals=signals)
        return job.end()


class Run:
    """One run directory, and the checks of it after each launch."""

    def __init__(self, config, path):
        self.config, self.path = config, path

    def stop_at(self, failpoint, **how):
        ended = stop_at(self.config, failpoint, **how)
        assert ended.seconds < BOUND
        assert not ended.orphans
        return ended

    def steps_saved(self):
        """The steps of the committed checkpoints, all of which are intact. Nothing unfinished is next to them."""
        found = committed(self.path / "checkpoints")
        for checkpoint in found:
            verify(checkpoint)
        assert {path.name for path in (self.path / "checkpoints").iterdir()} == {path.name for path in found}
        return [int(path.name[5:]) for path in reversed(found)]

    def last_end(self):
        return json.loads((self.path / "lineage.json").read_text())[-1].get("reason")
