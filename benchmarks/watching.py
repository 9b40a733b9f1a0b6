"""The cost of detecting shards that change: the time of reads with the checks of `shards/watch.py`, over that without.

One source reads the same batches alternately with and without checks, so that other load on the machine affects both
equally. On its own: `python benchmarks/watching.py [--save results.json]`, half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contenders
import rounds

SAMPLES = 20_480
ROUNDS, BATCHES = 60, 10  # of both, in each of two orders, after one round that is discarded
AT_MOST = 1.03


class NoWatch:
    """Replaces `ShardWatch`: never checks."""

    def learn(self, owner: int, shard: object) -> None: ...

    def is_due(self) -> bool:
        return False


def cost(folders: Mapping[str, Path]) -> dict[str, Any]:
    """By name of a folder of latent shards: times of a read with checks over reads without, medians over rounds."""
    return {name: _cost(folder) for name, folder in folders.items()}


def _cost(folder: Path) -> dict[str, float]:
    """One source, so that both read the same maps into the same memory."""
    source, stream = contenders.ours_at_rest(folder)
    watch = source.watch
    sides, clock, cpu, shards = (watch, NoWatch()), [], [], []
    for first in range(0, stream.count, contenders.BATCH):  # opens and verifies everything
        source.read(stream.locate(np.arange(first, first + contenders.BATCH)), None)
    at, left = 0, time.perf_counter()
    for number in range(ROUNDS + 1):
        spent = np.zeros((2, 2))  # [with, without], [clock, CPU]
        for order in ((0, 1), (1, 0)):  # the second side finds the caches filled
            for side in order:
                source.watch = sides[side]
                if side == 0:  # the other side's time does not count: extend the pause between checks by it
                    watch._next_check += time.perf_counter() - left
                for first in range(at, at + BATCHES * contenders.BATCH, contenders.BATCH):
                    places = stream.locate(np.arange(first, first + contenders.BATCH))
                    shards.append(len(np.unique(places.shards)))
                    began = time.perf_counter(), time.thread_time()
                    source.read(places, None)
                    spent[side] += time.perf_counter() - began[0], time.thread_time() - began[1]
                left = time.perf_counter() if side == 0 else left
            at += BATCHES * contenders.BATCH
        if number:
            clock.append(spent[0, 0] / spent[1, 0])
            cpu.append(spent[0, 1] / spent[1, 1])
    source.close()
    return {
        "shards_in_a_batch": statistics.mean(shards),
        "by_the_clock": float(statistics.median(clock)),
        "in_cpu_time": float(statistics.median(cpu)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="also write everything measured to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ecar-benchmark-") as folder:
        arrays, homes = Path(folder) / "arrays", {}
        contenders.write_arrays(arrays, SAMPLES)
        for name in ("ours", "ours, small shards"):
            homes[name] = Path(folder) / contenders.CONTENDERS[name].folder
            homes[name].mkdir()
            contenders.CONTENDERS[name].write(arrays, homes[name])
        result: dict[str, Any] = {"watching": cost(homes), "hardware": options.hardware or rounds.hardware()}
    for name, found in result["watching"].items():
        print(f"{name}: {found}; wanted <= {AT_MOST}")
    rounds.publish(result, options.save)


if __name__ == "__main__":
    main()
