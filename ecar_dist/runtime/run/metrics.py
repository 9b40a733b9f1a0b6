"""metrics.jsonl and TensorBoard: the same tags in both, and one curve across restarts.

Code for a single process: only rank 0 has the writer.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecar_dist.command_line import counted
from ecar_dist.config.read import shown_yaml
from ecar_dist.errors import reason_of
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.runtime.run.event_file import EventFile
from ecar_dist.runtime.run.trackers import Tracker
from ecar_dist.storage.atomic import atomic_write, set_aside
from ecar_dist.storage.untrusted import JsonLines, UntrustedError, parse_object

HELD_BYTES = 1 << 22  # of lines that wait for a full disk
# Charts of several curves, in the order in which a person looks at them: group -> chart -> patterns of tags.
CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "loss": {
        "training and validation": ("^train/loss$", "^eval/loss$", "^eval/loss_ema$"),
        "training loss of each stage": (r"^train/loss_stage\d+$",),
        "validation loss of each stage (EMA)": (r"^eval/loss_ema_stage\d+$",),
        "training loss by stage and flow time": (r"^train/loss_stage\d+_t\d+$",),
    },
    "validation": {
        "weights": (r"^eval/loss(_stage\d+)?$",),
        "EMA": (r"^eval/loss_ema(_stage\d+)?$",),
        "scores": ("^eval/(?!loss)",),
    },
    "performance": {
        "samples per second": ("^perf/samples_per_second$",),
        "MFU and goodput": ("^perf/mfu$", "^perf/goodput$"),
        "share of the time in each phase": ("^time/",),
        "waiting for data": ("^perf/data_wait_fraction$", "^checkpoint/stall_fraction$"),
        "memory (GiB)": ("^mem/",),
    },
    "optimization": {
        "learning rate": ("^train/lr$",),
        "gradient norm": ("^train/grad_norm$",),
        "steps that moved no weight": ("^train/skipped_steps$",),
    },
}
PREVIEW = "samples/stages"  # the tag of the strips
_LINEAGE = ("started", "world_size", "zero_stage", "precision", "device", "resumed_from_step", "ended", "reason")


class MetricsWriter:
    """Writes what is measured at a step.

    On resume everything after `start_step` belongs to steps that will be repeated: it is dropped from both files. A
    disk error never ends training: lines of metrics.jsonl wait in memory for the disk, TensorBoard events are dropped.
    """

    def __init__(
        self, directory: RunDirectory, start_step: int, tensorboard: bool, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._directory = directory
        self._trackers = trackers
        self._drop_after(start_step)
        self._lines = _LineFile(directory.metrics)
        self._board: EventFile | None = None
        if tensorboard:
            self._board = EventFile(directory.tensorboard, purge_step=start_step + 1)
            self.text("lineage", lineage_table(directory.attempts()), start_step)
            if directory.config.exists():
                self.text("config", f"```yaml\n{shown_yaml(directory.config.read_text())}```\n", start_step)
            self._lay_out(start_step)

    def log(self, step: int, samples_seen: int, values: Mapping[str, float]) -> None:
        """Write one line, and one event per value. A value that is not finite is null in metrics.jsonl."""
        if self._board and self._board.dropped:
            values = {**values, "log/dropped_events": float(self._board.dropped)}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        for tracker in self._trackers:
            tracker.log(step, {**values, "train/samples_seen": float(samples_seen)})
        self._lines.write(json.dumps({"step": step, "samples_seen": samples_seen, **finite}) + "\n")
        if self._board:
            from torch.utils.tensorboard import summary

            for tag, value in {**values, "train/samples_seen": samples_seen}.items():
                self._board.add(step, partial(summary.scalar, tag, value))

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3], to TensorBoard and to samples/step-NNNNNNNN.png in the run directory."""
        try:
            self._directory.samples.mkdir(exist_ok=True)  # there is no such folder before the first picture
            Image.fromarray(picture).save(self._directory.preview(step))
        except OSError as error:
            reason = reason_of(error)
            print(f"warning: the picture of step {step} is not in samples/ ({reason})", file=sys.stderr, flush=True)
        for tracker in self._trackers:
            tracker.image(tag, picture, step)
        if self._board:
            from torch.utils.tensorboard import summary

            self._board.add(step, partial(summary.image, tag, picture, dataformats="HWC"))

    def text(self, tag: str, text: str, step: int) -> None:
        """Write Markdown, to TensorBoard only."""
        if self._board:
            from torch.utils.tensorboard import summary

            self._board.add(step, partial(summary.text, tag, text))

    def _lay_out(self, step: int) -> None:
        """Define the charts of the dashboard "custom scalars"."""
        from torch.utils.tensorboard import summary

        assert self._board is not None
        charts = {
            title: {name: ["Multiline", list(tags)] for name, tags in group.items()} for title, group in CHARTS.items()
        }
        self._board.add(step, partial(summary.custom_scalars, charts))

    def rewind(self, step: int) -> None:
        """The run was rolled back to `step`: drop what came after it, as on a resume."""
        self._lines.close()
        try:
            self._drop_after(step)
        except OSError as error:  # the old lines stay; of two lines of one step, the later one counts
            self._lines.say(error)
        self._lines = _LineFile(self._directory.metrics)
        if self._board:
            self._board.close()
            self._board = EventFile(self._directory.tensorboard, step + 1, self._board.dropped)

    def close(self) -> None:
        self._lines.close()
        if self._board:
            self._board.close()
        for tracker in self._trackers:
            tracker.close()

    def _drop_after(self, step: int) -> None:
        """Whatever the file contains, training continues: a file that cannot be read is set aside."""
        path = self._directory.metrics
        try:
            damaged = _keep_up_to(path, step)
        except FileNotFoundError:
            return
        except UntrustedError as error:
            aside = set_aside(path)
            print(
                f"warning: {path} cannot be read ({error}): it is now {aside.name}, a new one begins", file=sys.stderr
            )
            return
        if damaged:
            lines = counted(damaged, "damaged line")
            print(f"warning: {path} had {lines}, now removed; no other line is lost", file=sys.stderr)


class _LineFile:
    """Appends lines. Lines that cannot be written wait, up to HELD_BYTES; an error is printed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = b""
        self._said = False
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        if len(self._held) < HELD_BYTES:
            self._held += line.encode()
        try:
            while self._held:
                self._held = self._held[self._file.write(self._held) :]
        except OSError as error:
            self.say(error)

    def close(self) -> None:
        self.write("")
        try:
            self._file.close()
        except OSError as error:  # a network drive may refuse only now
            self.say(error)

    def say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            print(
                f"ecar-dist: {self._path} cannot be written ({reason_of(error)}); training continues, the lines wait",
                file=sys.stderr,
                flush=True,
            )


def lineage_table(attempts: Sequence[Mapping[str, Any]]) -> str:
    """The attempts of a run as a Markdown table, one row each."""
    rows = [_LINEAGE, ["---"] * len(_LINEAGE)]
    rows += [["" if attempt.get(name) is None else str(attempt[name]) for name in _LINEAGE] for attempt in attempts]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def log_scores(directory: RunDirectory, step: int, scores: Mapping[str, Any]) -> None:
    """Write the numbers of an evaluation to the run's TensorBoard folder, as `eval/...`."""
    from torch.utils.tensorboard import summary

    board = EventFile(directory.tensorboard)
    for name, value in scores.items():
        if isinstance(value, float):
            board.add(step, partial(summary.scalar, f"eval/{name}", value))
    board.close()


def log_preview(directory: RunDirectory, step: int, picture: np.ndarray, tensorboard: bool) -> Path:
    """Write a picture as `MetricsWriter.image` does, while training may be running; returns its path.

    The TensorBoard file is in its own folder: a reader abandons the training's file for good once there is a newer one
    next to it. The PNG file is written last and atomically: it shows that the step is done. Raises OSError.
    """
    if tensorboard:
        from torch.utils.tensorboard import summary

        board = EventFile(directory.tensorboard / "previews")
        board.add(step, partial(summary.image, PREVIEW, picture, dataformats="HWC"))
        board.close()

    directory.samples.mkdir(exist_ok=True)
    with atomic_write(directory.preview(step)) as file:
        Image.fromarray(picture).save(file, format="PNG")
    return directory.preview(step)


def _keep_up_to(path: Path, step: int) -> int:
    """Rewrite the file without later steps and without damaged lines; returns the number of damaged lines.

    Raises UntrustedError if it is not a log or cannot be read, FileNotFoundError, and OSError if writing fails.
    """
    try:
        lines = JsonLines(path, _step_and_line)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UntrustedError(reason_of(error)) from None

    with lines, atomic_write(path) as kept:
        for found, line in lines:
            if found <= step:
                kept.write(line.rstrip() + b"\n")
    return lines.damaged


def _step_and_line(line: bytes) -> tuple[int, bytes]:
    """Raises UntrustedError if this is not the line of a step."""
    step = parse_object(line).get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise UntrustedError("it is not a line of a step")
    return step, line
