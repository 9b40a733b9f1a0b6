"""Sampling speed of trained runs: latency with one image, throughput with many.

All runs alternate in one process, with torch's threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import DEVICE, Draw, Run

from ecar_dist.sample.generate import SamplingPlan, generate
from ecar_dist.sample.load import open_trained

ROUNDS, LARGE = 3, 64
LATENCY, THROUGHPUT = "seconds at batch 1", f"images/s at batch {LARGE}"


def speeds(work: Path, rows: Sequence[tuple[Run, Draw]], classes: int = 10) -> list[dict[str, float]]:
    """Medians over rounds, without the autoencoder. Every row runs once per round; one round is not timed."""
    models = {run.name: open_trained(run.load(work).run_directory, DEVICE) for run, _ in rows}
    seconds: list[dict[int, list[float]]] = [{1: [], LARGE: []} for _ in rows]
    for number in range(ROUNDS + 1):
        for (run, draw), found in zip(rows, seconds, strict=True):
            trained = models[run.name]
            plan = SamplingPlan.from_config(draw.of(trained.config), DEVICE)
            for batch, times in found.items():
                indices = torch.arange(batch)
                began = time.perf_counter()
                generate(trained.model, plan, indices % classes, indices, seed=0)
                if number:
                    times.append(time.perf_counter() - began)
    return [
        {LATENCY: statistics.median(found[1]), THROUGHPUT: LARGE / statistics.median(found[LARGE])} for found in seconds
    ]
