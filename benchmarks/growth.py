"""The cost of a larger set before the first batch and while it streams: seconds, and resident bytes per sample.

As a script, it measures one set in a fresh process: `growth.py plan|read FOLDER` prints a line of JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import rounds

_SAMPLE_BYTES = 1024  # the minimum that a manifest accepts; the files are sparse


def start_up(work: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Seconds and peak memory from the manifest to the first 4096 locations of a run that resumes mid-epoch.

    Results are by size of the set. The sets have real manifests and sparse files, so every step is real except reading
    the content.
    """
    measured = {}
    for size in sizes:
        folder = work / f"set_of_{size}"
        write_hollow_set(folder, size)
        measured[size] = _in_fresh_process("plan", folder)
    smallest, largest = min(sizes), max(sizes)
    growth = (measured[largest]["bytes"] - measured[smallest]["bytes"]) / (largest - smallest)
    return {"seconds": {size: found["seconds"] for size, found in measured.items()}, "bytes_per_sample": growth}


def held_while_reading(work: Path) -> float:
    """Bytes per sample that the loader holds after it has opened every shard: a full set minus half of it."""
    from ecar_dist.data.shards.manifest import load_manifest

    whole, half = work / "ours", work / "ours_half"
    manifest = load_manifest(whole)
    write_part_of_set(whole, half, len(manifest.shards) // 2)
    held = {folder: _in_fresh_process("read", folder)["bytes"] for folder in (whole, half)}
    return (held[whole] - held[half]) / (manifest.count - load_manifest(half).count)


def write_hollow_set(folder: Path, size: int) -> None:
    """A set of `size` samples with a real manifest and sparse files of zeros instead of the shards."""
    from ecar_dist.data.shards.entries import LatentEntry
    from ecar_dist.data.shards.manifest import Manifest, write_manifest

    folder.mkdir()
    entries = []
    for index, first in enumerate(range(0, size, contenders.SHARD_SAMPLES)):
        count = min(contenders.SHARD_SAMPLES, size - first)
        name = f"{index:06d}.tar"
        size_in_bytes = count * _SAMPLE_BYTES
        (folder / name).touch()
        os.truncate(folder / name, size_in_bytes)
        entries.append(LatentEntry(name, size_in_bytes, count, first, f"{index:032x}", f"{index:064x}", first))
    write_manifest(folder, Manifest(size, 1, ["0"], contenders.SHAPE, False, {}, {}, {}, entries))


def write_part_of_set(whole: Path, part: Path, shards: int) -> None:
    """A finished set of the first `shards` shards of the set `whole`, without copies."""
    from ecar_dist.data.shards.manifest import load_manifest, write_manifest

    manifest = load_manifest(whole)
    part.mkdir()
    entries = manifest.shards[:shards]
    for entry in entries:
        for name in (Path(entry.name).with_suffix(suffix).name for suffix in (".tar", ".idx", ".json")):
            os.link(whole / name, part / name)
    count = sum(entry.count for entry in entries)
    write_manifest(part, dataclasses.replace(manifest, count=count, shards=entries))


def _in_fresh_process(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, what, str(folder)]
    done = subprocess.run(command, env=rounds.environment(), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _measure_plan(folder: Path) -> dict[str, float]:
    """All steps to the first locations of a run that resumes mid-epoch: manifest, presence, order, next shards."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have raised
    before, began = _memory("VmRSS"), time.perf_counter()
    source, stream = contenders.ours_at_rest(folder)
    resumed = stream.count // 2
    stream.locate(np.arange(resumed, resumed + 4096))
    stream.upcoming(resumed, resumed + stream.count, (0,), 1)
    seconds = time.perf_counter() - began
    source.close()
    return {"seconds": seconds, "bytes": _memory("VmHWM") - before}


def _measure_read(folder: Path) -> dict[str, float]:
    source, stream = contenders.ours_at_rest(folder)
    tracemalloc.start()
    for first in range(0, stream.count, contenders.BATCH):
        source.read(stream.locate(np.arange(first, min(first + contenders.BATCH, stream.count))), None)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    source.close()
    return {"bytes": held}


def _memory(what: str) -> int:
    """Bytes: `VmRSS` resident now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


if __name__ == "__main__":
    # Imports first, so that neither their time nor their memory is counted as the set's.
    contenders.import_all(contenders.CONTENDERS["ours"])
    print(json.dumps({"plan": _measure_plan, "read": _measure_read}[sys.argv[1]](Path(sys.argv[2]))))
