"""Weights & Biases and MLflow: they receive what TensorBoard receives, if the config names them.

metrics.jsonl in the run directory stays the record of the run. A tracker that fails is left out from then on; it never
ends training. Both continue the same curve when a run is resumed: they find it by the id of the run.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ecar_dist.config.knobs_training import LogSection
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.run.directory import RunDirectory
from ecar_dist.storage.redaction import redact, redact_text, redact_tree
from ecar_dist.storage.untrusted import printable

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # knob of the section `log` -> package; an extra has the knob's name
EXPERIMENT = "ecar_dist"  # of MLflow
RUN_TAG = "ecar_dist.run_id"


class Tracker(Protocol):
    """A service that shows the curves of runs. Raises nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, by tag."""

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""

    def close(self) -> None:
        """The attempt has ended."""


def check_trackers(log: LogSection) -> None:
    """Raises ConfigError if the package of a tracker is not installed."""
    for knob, package in PACKAGES.items():
        if getattr(log, knob) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.{knob} needs the package {package}, which is missing; `pip install 'ecar-dist[{knob}]'`, or set "
                f"log.{knob}=null"
            )


def open_trackers(config: RunConfig, directory: RunDirectory) -> list[Tracker]:
    """The trackers of a run. Raises ConfigError if one cannot be opened."""
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: _Wandb(str(config.log.wandb), config, directory),
        "mlflow": lambda: _MLflow(str(config.log.mlflow), config, directory),
    }
    trackers: list[Tracker] = []
    for knob, make in makers.items():
        if (target := getattr(config.log, knob)) is None:
            continue
        try:
            trackers.append(_Careful(knob, make()))
        except Exception as error:  # whatever the service raises
            raise ConfigError(
                f"log.{knob}={printable(redact(target), 200)} cannot be opened ({_reason(error)}); check the name, the "
                f"network and the login, or set log.{knob}=null"
            ) from None
    return trackers


class _Careful:
    """A tracker that is left out after its first error, which is printed."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda tracker: tracker.log(step, values))

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._try(lambda tracker: tracker.image(tag, picture, step))

    def close(self) -> None:
        self._try(lambda tracker: tracker.close())

    def _try(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # whatever the service raises: training continues without it
            self._tracker = None
            line = f"warning: log.{self._name} is no longer updated ({_reason(error)}); metrics.jsonl has everything"
            print(line, file=sys.stderr, flush=True)


class _Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline writes it to the run directory, for `wandb sync`."""

    def __init__(self, project: str, config: RunConfig, directory: RunDirectory) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=config.run.name,
            id=directory.run_id,
            resume="allow",
            dir=str(directory.path),
            config=_shown(config),
        )
        # The x-axis is our step. wandb's own steps can only increase, but a resumed run repeats some of ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(picture), "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, in the experiment EXPERIMENT of a tracking server, or of a local folder."""

    def __init__(self, uri: str, config: RunConfig, directory: RunDirectory) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client = MlflowClient(tracking_uri=uri)
        self._metric = Metric

        # The experiment, and in it the run of an earlier attempt.
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        earlier = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{directory.run_id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {RUN_TAG: directory.run_id}
        self._id = self._client.create_run(experiment, run_name=config.run.name, tags=tags).info.run_id
        self._client.log_dict(self._id, _shown(config), "config.yaml")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Its servers refuse numbers that are not finite.
        metrics = [self._metric(tag, value, 0, step) for tag, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        from PIL import Image

        self._client.log_image(self._id, Image.fromarray(picture), f"{tag}-{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _shown(config: RunConfig) -> dict[str, Any]:
    """The config without secrets."""
    tree: dict[str, Any] = redact_tree(config.model_dump(mode="json"))
    return tree


def _reason(error: Exception) -> str:
    return printable(redact_text(f"{type(error).__name__}: {error}"), 200)
