"""A training of an autoencoder on its way: one file in OUT from which the same command goes on, gone at the end."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from data_tools.encode.failures import ERRORS_NAME
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write, sync_to_disk
from ecar_dist.storage.untrusted import parse_json
from ecar_dist.vae.pretrained import save_autoencoder

STATE_NAME = ".train-vae.state"
_FINISHED_NAME = ".finished"
_CONFIG_NAME = "config.json"  # the mark of a whole autoencoder: moved into place last


@dataclass(frozen=True)
class Training:
    """What a step changes, on one device."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    device: torch.device


class TrainingFolder:
    """OUT of `train-vae`: a state while it trains, an autoencoder when it is done.

    Raises DataError where OUT holds anything else, or the state of another command.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._out, self._settings, self._state = out, settings, out / STATE_NAME
        self._check_occupied()

    def _check_occupied(self) -> None:
        if not os.path.lexists(self._out):
            return
        if not self._out.is_dir():
            raise DataError(f"{self._out} is not a folder; give another one")
        others = {path.name for path in self._out.iterdir() if not path.name.startswith(".")} - {ERRORS_NAME}
        if others and not self._state.is_file():
            raise DataError(f"{self._out} exists and holds {min(others)}; remove it or give another folder")

    def restore(self, training: Training) -> tuple[int, list[dict[str, Any]]]:
        """Steps done, and the bad images met on the way; the training as it was after that step. (0, []) for none."""
        if not self._state.is_file():
            return 0, []
        try:
            with safe_open(self._state, framework="pt", device="cpu") as file:
                about = parse_json(file.metadata()["about"].encode())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            theirs, step, bad = about["settings"], int(about["step"]), list(about["bad"])
        except Exception as error:  # a damaged file fails in many ways
            raise self._damaged(error) from None
        changed = [key for key, value in self._settings.items() if theirs.get(key) != value]
        if changed:
            key = changed[0]
            raise DataError(
                f"{self._out} holds an unfinished training with {key} {theirs.get(key)}, this command has "
                f"{self._settings[key]}; repeat the first command, or remove the folder"
            )
        try:
            _load(training, about, tensors)
        except Exception as error:
            raise self._damaged(error) from None
        return step, bad

    def save(self, training: Training, step: int, bad: list[dict[str, Any]]) -> None:
        """Replace the state by that after `step` steps, whole or not at all."""
        optimizer = training.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in training.model.state_dict().items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
        tensors["generator.cpu"] = torch.get_rng_state()
        if training.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(training.device)
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

    def finish(self, model: Any, scaling_factor: float, shift_factor: float) -> None:
        """Put the autoencoder in place and remove the state. Killed in between, the same command does it again."""
        working = self._out / _FINISHED_NAME
        shutil.rmtree(working, ignore_errors=True)
        save_autoencoder(model, working, scaling_factor, shift_factor)
        for name in sorted(os.listdir(working), key=lambda name: name == _CONFIG_NAME):
            os.replace(working / name, self._out / name)
        working.rmdir()
        sync_to_disk(self._out)
        for path in self._out.glob(f".{STATE_NAME}*"):  # temporaries of runs that were killed
            path.unlink()
        self._state.unlink(missing_ok=True)

    def _damaged(self, error: Exception) -> DataError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return DataError(f"{self._state} is damaged ({reason:.200}); remove {self._out} and start again")


def _load(training: Training, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Into model, optimizer, schedule and generators."""
    model, moments = dict[str, torch.Tensor](), dict[int, dict[str, torch.Tensor]]()
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
