"""A training of an autoencoder on its way: one file in OUT from which the same command goes on, gone at the end."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.failures import ERRORS_NAME
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import atomic_write, sync_to_disk
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
            tree = torch.load(self._state, map_location="cpu", weights_only=True)  # runs no code
            theirs = tree["settings"]
            step, bad = int(tree["step"]), list(tree["bad"])
        except Exception as error:  # a damaged pickle fails in many ways
            raise self._damaged(error) from None
        changed = [key for key, value in self._settings.items() if theirs.get(key) != value]
        if changed:
            key = changed[0]
            raise DataError(
                f"{self._out} holds a training under way with another {key}: {theirs.get(key)}, this command's is "
                f"{self._settings[key]}; repeat the first command, or remove the folder"
            )
        try:
            training.model.load_state_dict(tree["model"])
            training.optimizer.load_state_dict(tree["optimizer"])
            training.schedule.load_state_dict(tree["schedule"])
            torch.set_rng_state(tree["rng"])
            if training.device.type == "cuda":
                torch.cuda.set_rng_state(tree["device_rng"], training.device)
        except Exception as error:
            raise self._damaged(error) from None
        return step, bad

    def save(self, training: Training, step: int, bad: list[dict[str, Any]]) -> None:
        """Replace the state by that after `step` steps, whole or not at all."""
        on_gpu = training.device.type == "cuda"
        tree = {
            "settings": self._settings,
            "step": step,
            "bad": bad,
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(training.device) if on_gpu else None,
        }
        with atomic_write(self._state) as file:
            torch.save(tree, file)

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
