"""One contender in its own process, in the interpreter that has its library.

`serving.py write NAME WORK` writes its files. `serve` runs one round for each JSON line on stdin, and answers with one
on stdout. `epochs` makes one pass over all samples for each line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import CONTENDERS, Batch, Contender, import_all, load_arrays

UNTIMED_BATCHES = 6  # at the start of each round: what was read ahead while others ran is not this round's work


def prove_same_bytes(arrays: Path, batch: Batch) -> None:
    """Check that every sample of the batch is one that was written, bit for bit, with its label."""
    moments, labels = load_arrays(arrays)
    got, got_labels = batch[0].numpy(), batch[1].numpy()
    if batch[0].dtype != torch.float16 or batch[1].dtype != torch.int64 or not batch[0].is_contiguous():
        raise SystemExit(f"the batch is {batch[0].dtype} {tuple(batch[0].shape)} with {batch[1].dtype} labels")
    row_of = {moments[row, 0, 0, :16].tobytes(): row for row in range(len(labels))}
    for sample, label in zip(got, got_labels, strict=True):
        row = row_of.get(sample[0, 0, :16].tobytes())
        if row is None or label != labels[row] or (sample.view(np.uint16) != moments[row].view(np.uint16)).any():
            raise SystemExit(f"a sample with label {label} differs from what was written (row {row})")


def measure_round(batches: Iterator[Batch], seconds: float) -> dict[str, Any]:
    """Consume for at least `seconds`: samples, wall and CPU seconds (all threads), and each batch's latency."""
    for _ in range(UNTIMED_BATCHES):
        next(batches)
    samples, latencies = 0, []
    cpu, began = time.process_time(), time.perf_counter()
    last = began
    while last - began < seconds:
        samples += len(next(batches)[1])
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    return {"samples": samples, "wall": last - began, "cpu": time.process_time() - cpu, "latencies": latencies}


def private_mib() -> float:
    """Private memory of the process: pages of mapped files, which the system can reclaim, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def versions(contender: Contender) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in (*contender.distributions, "numpy", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def serve(contender: Contender, work: Path, reply: Any) -> None:
    """Open the stream, verify its bytes, then run one round for each line of stdin until it ends."""
    torch.set_num_threads(1)
    import_all(contender)
    began = time.perf_counter()
    batches = contender.batches(work / contender.folder)
    first = next(batches)
    started = time.perf_counter() - began
    prove_same_bytes(work / "arrays", first)
    print(json.dumps({"start_seconds": started, "versions": versions(contender)}), file=reply, flush=True)
    for line in sys.stdin:
        measured = measure_round(batches, json.loads(line)["seconds"])
        measured["private_mib"] = private_mib()
        print(json.dumps(measured), file=reply, flush=True)


def epochs(contender: Contender, work: Path, reply: Any) -> None:
    """For each line of stdin, one pass over all samples, including opening and closing. No file is open in between."""
    import_all(contender)
    total = len(load_arrays(work / "arrays")[1])
    print(json.dumps({"versions": versions(contender)}), file=reply, flush=True)
    for _ in sys.stdin:
        began, seen = time.perf_counter(), 0
        with contextlib.closing(contender.batches(work / contender.folder)) as batches:
            while seen < total:
                seen += len(next(batches)[1])
        passed = time.perf_counter() - began
        gc.collect()  # before the answer: its files must be closed by then
        print(json.dumps({"seconds": passed}), file=reply, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "serve", "epochs"))
    parser.add_argument("name", choices=tuple(CONTENDERS))
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    # mosaicml-streaming imports torchvision for datasets unused here; with a CPU build of torch that may not load.
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    # Some libraries print to stdout, which carries the replies: give them stderr instead.
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = CONTENDERS[options.name]
    if options.action == "write":
        out = options.work / contender.folder
        out.mkdir(exist_ok=True)
        contender.write(options.work / "arrays", out)
    else:
        {"serve": serve, "epochs": epochs}[options.action](contender, options.work, reply)
    # Reader threads of some libraries outlive their dataset.
    reply.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
