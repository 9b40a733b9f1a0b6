"""`ecar-dist train`, writing down the samples of every step that is taken: python -m tests.train.recorded_ranks CONFIG.

RECORDS names the folder: one file for each rank of each attempt, one line for each step.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ecar_dist.cli import entry
from ecar_dist.train import loop


def record(train_step):
    """`train_step`, which first notes step, positions and sample ids of this rank's micro-batches."""
    file = Path(os.environ["RECORDS"]) / f"{os.getppid()}-{os.environ['RANK']}.jsonl"

    def recording(batches, progress, **parts):
        positions, sample_ids = (torch.cat(parts).tolist() for parts in zip(*map(places, batches), strict=True))
        line = {"step": progress.step + 1, "positions": positions, "sample_ids": sample_ids}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return train_step(batches, progress, **parts)

    return recording


def places(batch):
    return batch.positions, batch.sample_ids


if __name__ == "__main__":
    loop.train_step = record(loop.train_step)
    sys.argv[1:1] = ["train"]
    entry()
