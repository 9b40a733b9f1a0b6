"""metrics.jsonl and TensorBoard: the same tags in both, and one curve across restarts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ecar_dist.runtime.run_directory import RunDirectory
from ecar_dist.storage.atomic import atomic_write


class MetricsWriter:
    """Writes what is measured at a step; held by rank 0 alone.

    On resume everything after `start_step` belongs to steps that will be made again: it is dropped from both files.
    """

    def __init__(self, directory: RunDirectory, start_step: int, tensorboard: bool) -> None:
        self._drop_after(directory, start_step)
        self._lines = directory.metrics.open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory.tensorboard), purge_step=start_step + 1, flush_secs=10)

    def log(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n")
        if self._board:
            for tag, value in {**values, "train/samples_seen": samples_seen}.items():
                self._board.add_scalar(tag, value, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """picture: uint8 [H, W, 3]."""
        if self._board:
            self._board.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        if self._board:
            self._board.close()

    @staticmethod
    def _drop_after(directory: RunDirectory, start_step: int) -> None:
        if not directory.metrics.exists():
            return
        kept = [line for line in directory.metrics.read_text().splitlines() if _step_of(line) <= start_step]
        with atomic_write(directory.metrics) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def log_scores(directory: RunDirectory, step: int, scores: dict[str, Any]) -> None:
    """Put the numbers of an evaluation beside the run's curves, as `eval/...`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory.tensorboard)) as board:
        for name, value in scores.items():
            if isinstance(value, float):
                board.add_scalar(f"eval/{name}", value, step)


def _step_of(line: str) -> float:
    """The step of one line; a line cut by a kill counts as later than everything."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
