"""A rank without torch for the tests of the watchdog.

    RANK=... SIZE=... NODES=... watched_rank.py FOLDER HANG_SECONDS WAITING FIELDS_OF_DUTY

Ranks of different nodes do not meet, as if each node had its own kernel; with NODES=0 no rank gets a name.
It takes four steps, with a failpoint in every phase. Then it waits in "backward" as if for the others, for WAITING
seconds or until SIGUSR1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from ecar_dist.errors import DataError
from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.watchdog import watchdog
from ecar_dist.runtime.watchdog.meeting import name_for

STEPS = 4


def refuse() -> bytes:
    raise PermissionError


def main() -> int:
    rank, size = int(os.environ["RANK"]), int(os.environ["SIZE"])
    folder, hang_seconds, waiting = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    nodes = int(os.environ["NODES"])
    names = [str(place * nodes // size) for place in range(size)]
    world = SimpleNamespace(rank=rank, size=size, is_first=rank == 0, nodes=names)
    watchdog.name_for = lambda folder: name_for(f"{folder} {names[rank]}") if nodes else refuse()
    let_go = []
    signal.signal(signal.SIGUSR1, lambda *_: let_go.append(True))
    try:
        with watchdog.Watchdog(folder, world, hang_seconds, "first", **json.loads(sys.argv[4])) as dog:
            assert "torch" not in sys.modules, "the monitor imports the same modules, and must be small"
            for step in range(1, STEPS + 1):
                for phase in ("data", "forward", "backward", "checkpoint"):
                    dog.beat(phase, step)
                    failpoint(phase, step)
            failpoint("gloo closed by peer")
            if failpoint("agreed error"):
                raise DataError("said by this rank")
            dog.beat("backward", STEPS + 1)
            print("waiting", flush=True)
            until = time.monotonic() + waiting
            while time.monotonic() < until and not let_go:
                time.sleep(0.05)
                if failpoint("alive"):
                    dog.beat("backward", STEPS + 1)
    except RemoteError as remote:
        return 3 if remote.again else 4
    return 0


sys.exit(main())
