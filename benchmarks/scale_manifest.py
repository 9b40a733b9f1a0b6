"""The cost of a large set before a rank's first batch: `scale_manifest.py [--samples 1e8 1e9 1e10] [--form table]`.

The set has an entry for each shard of 4,096 samples, and no files. In a separate process, one of 1,024 ranks reads the
manifest, makes the order, and finds its first 4,096 samples, its shards of an epoch, and those of its node. `--form
list` writes the manifest of earlier releases, which lists the shards in JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.shards.cache import CacheOptions, ShardCache
from ecar_dist.data.shards.entries import TABLE_NAME, LatentEntry, ShardTable, write_table
from ecar_dist.data.shards.manifest import Manifest, load_manifest, write_manifest

SHARD = 4096  # samples
SHARD_BYTES = 73_400_320
RANKS = 1024
RANKS_PER_NODE = 8
BATCH = 131_072
CACHED = 1000  # files in the node's cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e8, 1e9, 1e10], help="samples in the sets")
    parser.add_argument("--form", choices=("table", "list"), default="table", help="of the manifest (default: table)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(start(options.measure)))
        return

    rows = {}
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            began = time.process_time()
            write_set(folder, int(samples) // SHARD, options.form)
            wrote = time.process_time() - began
            command = [sys.executable, __file__, "--measure", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=rounds.environment())
            size = sum(path.stat().st_size for path in folder.iterdir())
        found = {"MB": round(size / 1e6, 1), "write, s": round(wrote, 2), **json.loads(done.stdout.splitlines()[-1])}
        rows[f"{samples:.0e}"] = found
        print(f"{samples:.0e} samples: {found}", flush=True)
    rounds.publish({"form": options.form, "samples": rows, "hardware": rounds.hardware()}, options.save)


def write_set(folder: Path, shards: int, form: str) -> None:
    """A manifest of `shards` shards."""
    entries: Any
    if form == "table":
        record = write_table(folder, made_entries(shards), shards, len(f"{shards:06d}.tar"))
        entries = ShardTable(folder / TABLE_NAME, record)
    else:
        entries = list(made_entries(shards))
    count = shards * SHARD
    write_manifest(folder, Manifest(count, 1, ["0"], (16, 32, 32), False, {}, {}, {}, entries))


def made_entries(shards: int) -> Iterator[LatentEntry]:
    for index in range(shards):
        first = index * SHARD
        yield LatentEntry(f"{index:06d}.tar", SHARD_BYTES, SHARD, first, f"{index:032x}", f"{index:064x}", first)


def start(folder: Path) -> dict[str, float]:
    """CPU seconds of each part, and resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have raised
    before = memory("VmRSS")
    found: dict[str, float] = {}
    clock = time.process_time()

    def took(what: str) -> None:
        nonlocal clock
        found[f"{what}, s"] = round(time.process_time() - clock, 3)
        clock = time.process_time()

    # What a rank does when it starts.
    manifest = load_manifest(folder)
    assert len(manifest.dataset_id) == 64
    took("manifest")
    stream = SampleStream([manifest.counts], seed=0, global_batch_size=BATCH)
    ranks = range(RANKS_PER_NODE, 2 * RANKS_PER_NODE)
    resumed = stream.count // 2 // BATCH * BATCH
    stream.locate(np.concatenate([stream.rank_positions(resumed + step * BATCH, 9, RANKS) for step in range(32)]))
    took("order")
    (own,) = stream.upcoming(resumed, resumed + stream.count, [9], RANKS)
    entries = [manifest.shards[index] for index in own[:10_000]]
    took("own shards")
    (of_node,) = stream.upcoming(resumed, resumed + stream.count, ranks, RANKS)
    future = {shard: use for use, shard in enumerate(of_node)}
    took("shards of the node")
    found["start, s"] = round(sum(found.values()), 3)
    found["RSS growth, MB"] = round((memory("VmRSS") - before) / 1e6, 1)
    found["peak growth, MB"] = round((memory("VmHWM") - before) / 1e6, 1)

    # Making room for a shard, with many in the cache.
    with tempfile.TemporaryDirectory() as root:
        options = CacheOptions(Path(root), budget_bytes=1 << 60)
        cache = ShardCache("memory://set", "id", manifest.shards, options)
        for index in of_node[:CACHED]:
            (Path(root) / "id" / manifest.shards[index].name).touch()
        cache.retire(future)
        clock = time.process_time()
        cache._make_room(SHARD_BYTES)
        took("make room")
        cache.close()
    return {"own shards": len(entries), **found}


def memory(what: str) -> int:
    """Bytes: `VmRSS` resident now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


if __name__ == "__main__":
    main()
