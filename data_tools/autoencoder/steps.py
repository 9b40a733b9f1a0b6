"""The training loop of an autoencoder. It saves its state regularly."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch

from data_tools.autoencoder.pictures import Pictures
from data_tools.autoencoder.state import Training, TrainingFolder
from data_tools.progress import progress

_SAVE_SECONDS = 30.0  # between two saves; longer if saving takes more than 5 % of the time


def one_cycle(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and a one-cycle schedule that rises to `learning_rate` over a tenth of the steps."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    return optimizer, schedule


def update(training: Training, loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
    """One optimizer step, with the norm of the gradient of `parameters` clipped to 1."""
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    training.optimizer.step()
    training.schedule.step()


def run_steps(
    training: Training,
    pictures: Pictures,
    folder: TrainingFolder,
    steps: range,
    batch_size: int,
    *,
    step: Callable[[Training, torch.Tensor], torch.Tensor],
    label: str,
    shown: Callable[[float], str],
) -> None:
    """Do these steps. Save regularly and at the end.

    step: does one optimizer step on a batch of images, and returns the error before it, a scalar on the device. label:
    of the progress bar. shown: formats the error for the bar.
    """
    saved_at = time.monotonic()
    pause = _SAVE_SECONDS
    with progress(steps.stop, "step", label, initial=steps.start) as bar:
        for number in steps:
            images = pictures.training_batch(number, batch_size)
            if len(images):  # otherwise all images of the batch are bad
                error = step(training, images)
            bar.update()
            if number % 20 == 0 and len(images):
                bar.set_postfix_str(shown(error.item()), refresh=False)

            # Save, but spend at most about 5 % of the time on it.
            if number + 1 == steps.stop or time.monotonic() - saved_at >= pause:
                began = time.monotonic()
                folder.save(training, number + 1, [dataclasses.asdict(failure) for failure in pictures.bad.values()])
                saved_at = time.monotonic()
                pause = max(_SAVE_SECONDS, 20 * (saved_at - began))
