"""Replaces ecar-dist in tests of the job script alone: `train PLAN` runs the code in the file PLAN."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

RANK, LINK, NODE = (os.environ.get(f"SLURM{name}") for name in ("_PROCID", "_ARRAY_TASK_ID", "D_NODENAME"))
ATTEMPT = 1 + int(os.environ.get("SLURM_RESTART_COUNT", 0))


def note(name: str, text: object) -> None:
    Path(os.environ["ECAR_JOB_LOGS"], name).write_text(str(text))


def leave(status: int) -> NoReturn:
    """End like a rank that can still report its exit status."""
    if RANK == "0":
        note("exit-status", status)
    sys.exit(status)


def train_until_told() -> None:
    def stop(number: int, frame: object) -> None:
        print("told to stop", flush=True)
        leave(75)

    signal.signal(signal.SIGUSR1, stop)
    time.sleep(60)


if sys.argv[1] == "check":
    assert sys.argv[-3] == "--job"
    time.sleep(float(os.environ.get("CHECK_SECONDS", 0)))
    print(os.environ["RUN"], os.environ.get("USABLE", sys.argv[-2]), sep="\n")
else:
    if RANK == "0":
        logs = Path(os.environ["ECAR_JOB_LOGS"])
        begun = (logs / "started").stat().st_mtime
        for path in (logs / "exit-status", logs / "bad-nodes"):
            assert not path.exists() or path.stat().st_mtime >= begun, f"{path} is of an earlier attempt"
        note("exit-status", "")
    where = f"rank {RANK} of {os.environ['SLURM_NTASKS']} on {NODE}"
    print(f"attempt {ATTEMPT}: {where}", flush=True)
    exec(Path(sys.argv[2]).read_text())
    leave(0)
