"""Makes a rank record the samples of every step that it takes.

RECORDS names the folder: one file for each rank of each attempt, one line for each step.
"""

import json
import os
from pathlib import Path

import torch

from ecar_dist.train import loop


def record_steps():
    """From here on `train_step` first records step, positions and sample ids of this rank's micro-batches."""
    file = Path(os.environ["RECORDS"]) / f"{os.getpid()}-{os.environ['RANK']}.jsonl"
    train_step = loop.train_step

    def recording(batches, progress, flags, **parts):
        positions, sample_ids = (torch.cat(one).tolist() for one in zip(*map(places, batches), strict=True))
        line = {"step": progress.step + 1, "positions": positions, "sample_ids": sample_ids}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return train_step(batches, progress, flags, **parts)

    loop.train_step = recording


def places(batch):
    return batch.positions, batch.sample_ids
