"""The cost of the sample order on many nodes: bytes fetched over bytes needed in an epoch, and CPU time per sample.

`scale_order.py [--nodes 1 8 64 512] [--batch 131072]`: one set, and two sets mixed by sample, 24,414 shards in total.
Computed from the plans of the loader, for nodes that keep their shards for the epoch. `--first-version` computes it for
the order of earlier releases.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

from ecar_dist.data.order.stream import OrderMade, SampleStream

SHARD = 4096  # samples
SHARDS = 24_414
RANKS_PER_NODE = 8
LOOKED_AT = 5  # nodes
STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64, 512], help="of 8 ranks each")
    parser.add_argument("--batch", type=int, default=131_072, help="samples in a global batch (default: 131072)")
    parser.add_argument("--first-version", action="store_true", help="the order of earlier releases")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()

    rows = {}
    for name, weights in (("one set", (1.0,)), ("mixture 0.7 : 0.3", (0.7, 0.3))):
        sources = [[SHARD] * int(SHARDS * weight) for weight in weights]
        made = OrderMade(0) if options.first_version else None
        stream = SampleStream(sources, seed=1, global_batch_size=options.batch, weights=weights, made=made)
        for nodes in options.nodes:
            key = f"{name}, {nodes} nodes"
            rows[key] = {
                "fetched / needed": over_fetch(stream, options.batch, nodes),
                **cost(stream, options.batch, nodes),
            }
            print(key, rows[key], flush=True)
    rounds.publish({"batch": options.batch, "rows": rows, "hardware": rounds.hardware()}, options.save)


def over_fetch(stream: SampleStream, batch: int, nodes: int) -> float:
    """Shards that all nodes read in an epoch over those of the set, estimated from the plans of some nodes."""
    stop = stream.count * 99 // 100 // batch * batch
    needed = sum(map(len, stream.upcoming(0, stop, [0], 1)))
    some = sorted({round(part * (nodes - 1) / (LOOKED_AT - 1)) for part in range(LOOKED_AT)})
    world = nodes * RANKS_PER_NODE
    plans = [
        stream.upcoming(0, stop, range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE), world) for node in some
    ]
    return round(float(np.mean([sum(map(len, plan)) for plan in plans])) * nodes / needed, 3)


def cost(stream: SampleStream, batch: int, nodes: int) -> dict[str, float]:
    """CPU time to find a rank's samples: microseconds per sample, in blocks of 64 steps as in the loader."""
    world = nodes * RANKS_PER_NODE
    samples, began = 0, time.process_time()
    while time.process_time() - began < 0.5:
        at = samples * world
        starts = range(at, at + STEPS * batch, batch)
        samples += len(stream.locate(stream.positions_of_steps(starts, 1, world)))
    return {"us a sample": round((time.process_time() - began) / samples * 1e6, 2)}


if __name__ == "__main__":
    main()
