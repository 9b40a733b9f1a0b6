"""Real ranks that stop by themselves at a chosen place, so that a signal finds them exactly there."""

import os
import signal
import sys
from pathlib import Path

from ecar_dist.drills.processes import Ended, Job
from tests.conftest import free_port

PATIENCE = 120.0  # seconds after which a launch counts as hung
REQUEUE = 75


def launch(config, log, *overrides, ranks=2, failpoint="", module="ecar_dist", before=("train",)):
    """Start `train` on real ranks; a Job, to be used as a context."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    command += [str(free_port()), "-m", module, *before, str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ECAR_FAILPOINT": failpoint}
    return Job(command, environment, log, PATIENCE)


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def strike(job: Job, *ranks: int, signals=(signal.SIGTERM,)) -> None:
    """Once a failpoint has stopped these ranks: all signals to each of them, and let them go on."""
    processes = {}

    def all_stopped():
        processes.update(job.rank_processes())
        return all(is_stopped(processes.get(rank, 0)) for rank in ranks)

    job.wait_for(all_stopped, f"ranks {ranks} at the failpoint")
    for number in (*signals, signal.SIGCONT):
        job.strike(number, *ranks)


def stop_at(config, log, failpoint, *overrides, ranks=2, struck=None, signals=(signal.SIGTERM,), **launching) -> Ended:
    """Launch, strike the ranks (all, unless `struck` says which) at the failpoint, and wait for the end."""
    whom = range(ranks) if struck is None else struck
    only = f":rank={whom[0]}" if len(whom) == 1 else ""
    site, *conditions = failpoint.split(":")
    point = ":".join([f"{site}{only}", *conditions, "stop"])
    with launch(config, log, *overrides, ranks=ranks, failpoint=point, **launching) as job:
        strike(job, *whom, signals=signals)
        return job.end()
