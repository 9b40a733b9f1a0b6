"""The common ground of the drills: a small copy of the user's run in its own folder, and a quiet run to compare."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.config.run import RunConfig
from ecar_dist.drills.evidence import losses, read_metrics
from ecar_dist.drills.processes import Ended, Job, UnexpectedError, last_words, torchrun
from ecar_dist.errors import TrainingError
from ecar_dist.runtime.checkpoint.files import committed, step_of
from ecar_dist.runtime.run.directory import RunDirectory

STEPS, SAVE_EVERY, STRIKE_AT = 30, 10, 15
TOLERANCE = {"fp32": 1e-6, "bf16": 5e-3}  # relative, for losses
SHORTEST_STEP = 0.05  # seconds; faster steps are slowed down if a fault must strike at a chosen step
FIRST_PATIENCE = 600.0  # seconds for the quiet run, while the speed of the run is not known yet


class CannotRunError(Exception):
    """The drill needs something that is missing here; the message names it."""


@dataclass(frozen=True)
class Quiet:
    """Results of an undisturbed run."""

    losses: dict[int, float]
    seconds: float  # from launch to end
    startup_seconds: float  # from launch to the first step
    step_seconds: float  # median
    checkpoint_bytes: int


class Ground:
    """The folder, the small config and the number of ranks of a set of drills."""

    def __init__(self, config: RunConfig, folder: Path, ranks: int) -> None:
        config.grad_accum_steps(ranks)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ranks = ranks
        self.config = scaled_down(config, folder)
        self.device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"  # NCCL allows one rank per GPU
        self.precision = self.config.precision_on(self.device)
        self.tolerance = TOLERANCE[self.precision]
        self.config_file = folder / "config.yaml"
        self.config_file.write_text(config_to_yaml(self.config))

    @functools.cached_property
    def quiet(self) -> Quiet:
        """The undisturbed run, made on first use. Raises TrainingError if it fails."""
        # Train to the end.
        trial = Trial(self, "quiet")
        began = time.monotonic()
        with trial.start() as job:
            with contextlib.suppress(UnexpectedError):  # its exit status shows why
                job.reach(1)
            startup = time.monotonic() - began
            ended = job.end()
        if ended.status != 0:
            raise TrainingError(
                f"the quiet run of the drills ended with status {ended.status}: {last_words(ended.text)}; fix that "
                f"first (log: {self.folder / 'logs/quiet-1.txt'})"
            )

        # Its losses, speed and checkpoint size.
        metrics = trial.metrics()
        newest = committed(trial.checkpoints)[0]
        rates = [entry["perf/samples_per_second"] for entry in metrics if "perf/samples_per_second" in entry]
        step = self.config.batch.global_batch_size / statistics.median(rates)
        size = sum(path.stat().st_size for path in newest.iterdir())
        return Quiet(losses(metrics), time.monotonic() - began, startup, step, size)

    def prepare(self) -> None:
        """Make the quiet run if it does not exist yet."""
        _ = self.quiet

    def clear(self, name: str) -> None:
        """Remove the runs of a drill, whose names begin with its name: checkpoints may be large."""
        for path in (self.folder / "runs").glob(f"{name}*"):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def patience(self) -> float:
        """Seconds after which a launch counts as hung."""
        known = self.__dict__.get("quiet")
        return 90 + 5 * known.seconds if known else FIRST_PATIENCE


class Trial:
    """One run directory, trained by one or more launches of the same command."""

    def __init__(
        self,
        ground: Ground,
        name: str,
        overrides: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        self._ground = ground
        self._name = name
        self._launches = 0
        self._overrides = (f"run.name={name}", *overrides)
        self._environment = environment or {}
        self.path = ground.folder / "runs" / name
        self.checkpoints = checkpoints or RunDirectory(self.path).checkpoints

    def start(self, *overrides: str, failpoint: str = "", ranks: int | None = None, prefix: Sequence[str] = ()) -> Job:
        """Launch the run. `prefix`: words in front of the launcher's command."""
        self._launches += 1
        ground = self._ground
        log = ground.folder / "logs" / f"{self._name}-{self._launches}.txt"
        log.parent.mkdir(exist_ok=True)
        command = torchrun(ranks or ground.ranks, ground.config_file, [*self._overrides, *overrides])
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **self._environment}
        environment.pop("ECAR_FAILPOINT", None)
        if failpoint:
            environment["ECAR_FAILPOINT"] = failpoint
        if ground.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return Job([*prefix, *command], environment, log, ground.patience)

    def slow_steps(self, action: str = "delay") -> str:
        """A failpoint that makes steps long enough for a signal to hit a chosen one.

        action: `delay` or, for ranks whose speed is compared, `burn`, which takes longer if a rank gets less time.
        """
        return f"train.step:{action}={SHORTEST_STEP}" if self._ground.quiet.step_seconds < SHORTEST_STEP else ""

    def reach(self, job: Job, step: int) -> None:
        """Wait for this step and for the checkpoint before it, which is written while training continues."""
        job.reach(step)
        due = (step - 1) // SAVE_EVERY * SAVE_EVERY
        job.wait_for(lambda: self.newest_step() >= due, f"checkpoint of step {due}")

    def train(self, *overrides: str, failpoint: str = "", prefix: Sequence[str] = ()) -> Ended:
        """Launch the run and wait until it ends."""
        with self.start(*overrides, failpoint=failpoint, prefix=prefix) as job:
            return job.end()

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")

    def newest_step(self) -> int:
        """The step of the newest committed checkpoint; 0 if there is none."""
        return max((step_of(path.name) for path in committed(self.checkpoints)), default=0)

    def resumed_from(self) -> int | None:
        """The step that the last attempt resumed from, 0 for the start; None if it did not get that far."""
        last = ([{}, *RunDirectory(self.path).attempts()])[-1]
        return (last["resumed_from_step"] or 0) if "resumed_from_step" in last else None


def scaled_down(config: RunConfig, folder: Path) -> RunConfig:
    """The same run in a few steps: same model, data, order and batch, in its own folder, without previews."""
    tree = config.model_dump(mode="json")
    batch = config.batch.global_batch_size
    total = STEPS * batch
    tree["run"] |= {"name": "quiet", "dir": str(folder / "runs")}
    tree["train"]["total_samples"] = total
    for part in ("warmup_samples", "cooldown_samples"):
        tree["optim"][part] = min(tree["optim"][part], total // 4)
    tree["checkpoint"] |= {"every_samples": SAVE_EVERY * batch, "keep": 3, "keep_every_samples": 0, "dir": None}
    tree["ema"]["snapshot_every_samples"] = tree["sample"]["every_samples"] = 0
    tree["log"] |= {"every_steps": 1, "tensorboard": False}
    tree["data"]["cache"]["dir"] = str(folder / "cache")
    return config_from_dict(tree)
