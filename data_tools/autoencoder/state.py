"""The state of an unfinished training run: a file in its folder, from which the same command resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from data_tools.failures import ERRORS_NAME
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write, sync_to_disk
from ecar_dist.storage.untrusted import parse_json

STATE_NAME = ".train-vae.state"
_FINISHED_NAME = ".finished"
_CONFIG_NAME = "config.json"  # moved into place last, so an autoencoder that has it is complete


@dataclass(frozen=True)
class Training:
    """Everything that a step changes, on one device."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    device: torch.device


class TrainingFolder:
    """The folder of a training run. It contains the state during the run, and the autoencoder afterwards.

    `settings` identify the run. Raises DataError if OUT contains anything else, or the state of a different run.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._out = out
        self._settings = settings
        self._state = out / STATE_NAME
        self._check_occupied()

    def _check_occupied(self) -> None:
        if not os.path.lexists(self._out):
            return
        if not self._out.is_dir():
            raise DataError(f"{self._out} is not a folder; give another one")
        others = {path.name for path in self._out.iterdir() if not path.name.startswith(".")} - {ERRORS_NAME}
        if others and not self._state.is_file():
            raise DataError(f"{self._out} exists and contains {min(others)}; remove it or give another folder")

    def restore(self, training: Training) -> tuple[int, list[dict[str, Any]]]:
        """Load the state into `training`. Returns the steps done and the bad images found; (0, []) without a state."""
        if not self._state.is_file():
            return 0, []

        # Read everything before anything is changed.
        try:
            with safe_open(self._state, framework="pt", device="cpu") as file:
                about = parse_json(file.metadata()["about"].encode())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            theirs = about["settings"]
            step = int(about["step"])
            bad = list(about["bad"])
        except Exception as error:  # a damaged file fails in many ways
            raise self._damaged(error) from None

        # With different settings, training would continue to a different result.
        changed = [key for key, value in self._settings.items() if theirs.get(key) != value]
        if changed:
            key = changed[0]
            raise DataError(
                f"{self._out} contains an unfinished training with {key} {theirs.get(key)}, this command has "
                f"{self._settings[key]}; repeat the first command, or remove the folder"
            )

        try:
            _load(training, about, tensors)
        except Exception as error:
            raise self._damaged(error) from None
        return step, bad

    def save(self, training: Training, step: int, bad: list[dict[str, Any]]) -> None:
        """Atomically replace the state with the one after `step` steps."""
        # All tensors, under the flat names that safetensors needs.
        optimizer = training.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in training.model.state_dict().items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
        tensors["generator.cpu"] = torch.get_rng_state()
        if training.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(training.device)

        # Everything else as JSON in the metadata.
        about = {
            "settings": self._settings,
            "step": step,
            "bad": bad,
            "param_groups": optimizer["param_groups"],
            "schedule": training.schedule.state_dict(),
        }
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(self._state) as file:
            file.write(safetensors.torch.save(stored, {"about": json.dumps(about)}))

    def finish(self, save: Callable[[Path], None]) -> None:
        """Write the autoencoder and remove the state. If killed in between, the same command does it again.

        save: writes config.json and all other files into a folder, which it creates.
        """
        working = self._out / _FINISHED_NAME
        shutil.rmtree(working, ignore_errors=True)
        save(working)
        for name in sorted(os.listdir(working), key=lambda name: name == _CONFIG_NAME):
            os.replace(working / name, self._out / name)
        working.rmdir()
        sync_to_disk(self._out)
        for path in self._out.glob(f".{STATE_NAME}*"):  # temporary files of runs that were killed
            path.unlink()
        self._state.unlink(missing_ok=True)

    def _damaged(self, error: Exception) -> DataError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return DataError(f"{self._state} is damaged ({reason:.200}); remove {self._out} and start again")


def _load(training: Training, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Load into model, optimizer, schedule and random generators."""
    # Split the flat names of `TrainingFolder.save`.
    model: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            model[rest] = tensor
        elif part == "optimizer":
            index, _, value = rest.partition(".")
            moments.setdefault(int(index), {})[value] = tensor

    training.model.load_state_dict(model)
    training.optimizer.load_state_dict({"state": moments, "param_groups": about["param_groups"]})
    training.schedule.load_state_dict(about["schedule"])
    torch.set_rng_state(tensors["generator.cpu"])
    if training.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"], training.device)
