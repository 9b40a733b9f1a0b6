"""Two real ranks that only reduce: how the watchdog and the transport handle a peer that stops or dies."""

import sys
from pathlib import Path

import torch

from ecar_dist.failpoint import failpoint
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.start.rendezvous import start_world
from ecar_dist.runtime.watchdog.watchdog import Watchdog


def main() -> None:
    folder, hang_seconds = Path(sys.argv[1]), float(sys.argv[2])
    world = start_world()
    try:
        with Watchdog(folder, world, hang_seconds, "first") as dog:
            for step in range(1, 1_000_000):
                dog.beat("data", step)
                failpoint("data", step)
                world.sum(torch.ones(1))
                dog.beat("backward", step)
                world.gather(step)
    except RemoteError:
        sys.exit(3)


if __name__ == "__main__":
    main()
