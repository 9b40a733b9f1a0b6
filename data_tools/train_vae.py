"""`ecar-data train-vae`: a small KL autoencoder (diffusers' AutoencoderKL) on the user's own image shards.

It saves its state as it goes. Killed at any time, the same command goes on, on a CPU to the same weights, bit by bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_tools.autoencoder_state import Training, TrainingFolder
from data_tools.encode.encode import resolve_device
from data_tools.encode.failures import ERRORS_NAME, MAX_BAD, FailureTally
from data_tools.encode.markers import Failure
from data_tools.progress import progress
from ecar_dist.data.images.decode import ImageDecoder, open_decoder
from ecar_dist.data.images.formats import background_name, parse_background
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.pixels import from_pixels
from ecar_dist.vae.pretrained import NORM_GROUPS, new_autoencoder

_HELD_BACK = 256  # images that never train the autoencoder, at most a tenth of them
_SAVE_SECONDS = 30.0  # between two states, and at least twenty times what writing one takes


def train_vae(
    shards: Path,
    out: Path,
    *,
    image_size: int,
    downsample: int,
    latent_channels: int,
    channels: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    seed: int,
    decoder: str,
    device: str,
    background: str = "white",
    max_bad: float = MAX_BAD,
) -> None:
    """Loss: squared error per pixel value + kl_weight x KL per latent value. Prints PSNR on images held back.

    Bad images are left out and listed in OUT/errors.jsonl, up to max_bad x count of them. Raises DataError for more,
    and for an OUT that holds anything but an unfinished training by the same command; ConfigError where sizes do not
    fit.
    """
    settings = {name: value for name, value in locals().items() if name not in ("shards", "out", "max_bad")}
    levels = _levels(image_size, downsample)
    _check_channels(channels)
    colour = parse_background(background)
    target = torch.device(resolve_device(device))
    images = ImageShards(shards)
    # what an unfinished training must share with the command that goes on with it
    settings |= {
        "source": images.manifest.dataset_id,
        "device": target.type,
        "background": background_name(colour),
    }
    folder = TrainingFolder(out, settings)
    tally = FailureTally(out, len(images), max_bad)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pictures = _Pictures(images, open_decoder(decoder, background=colour), image_size, target, seed, tally)
    widths = [channels * min(2, 2**level) for level in range(levels + 1)]
    model = new_autoencoder(widths, latent_channels, layers_per_block=1).to(target)
    training = _training(model, target, learning_rate, steps)
    done, bad = folder.restore(training)
    pictures.bad = {failure["row"]: Failure(**failure) for failure in bad}
    try:
        _fit(training, pictures, folder, range(done, steps), batch_size, kl_weight)
        by_mean, by_sample = _held_back_psnr(model.eval(), pictures, batch_size)
        mean, std = _latent_mean_and_std(model, pictures, batch_size)
    finally:
        tally.write(list(pictures.bad.values()))
    folder.finish(model, scaling_factor=1.0 / std, shift_factor=mean)
    latent_side = image_size // downsample
    left_out = f"; {len(pictures.bad)} bad images left out, listed in {out / ERRORS_NAME}" if pictures.bad else ""
    print(
        f"{out}: latents {latent_channels}x{latent_side}x{latent_side}, scaling_factor {1 / std:.5f}, shift_factor "
        f"{mean:.5f}; PSNR on {len(pictures.held_back)} held-back images {by_mean:.2f} dB, of posterior samples "
        f"{by_sample:.2f} dB{left_out}"
    )


def _check_channels(channels: int) -> None:
    if channels % NORM_GROUPS:
        raise ConfigError(f"--channels {channels} is not a multiple of {NORM_GROUPS}; give e.g. {8 * NORM_GROUPS}")


class _Pictures:
    """Decoded batches in [-1, 1], and the split of the images into training and held back."""

    def __init__(
        self,
        shards: ImageShards,
        decoder: ImageDecoder,
        image_size: int,
        device: torch.device,
        seed: int,
        tally: FailureTally,
    ) -> None:
        self.bad: dict[int, Failure] = {}  # by index; each is met once
        self._shards, self._decoder, self._image_size, self._device = shards, decoder, image_size, device
        self._seed, self._tally = seed, tally
        if len(shards) < 2:
            raise DataError(f"the set has {len(shards)} image, train-vae needs at least 2: some are held back")
        mixed = sample_indices(np.arange(len(shards)), len(shards), seed)
        number = max(1, min(_HELD_BACK, len(shards) // 10))
        self.held_back, self.training = mixed[:number], mixed[number:]

    def load(self, indices: np.ndarray) -> torch.Tensor:
        """Float32 [G, 3, S, S] of the good ones. Raises DataError where too many are bad."""
        # pairs, not a dict: a batch across the end of an epoch may hold an image twice
        records = [(index, self._shards.read(index)) for index in map(int, indices) if index not in self.bad]
        blobs = [record.data for _, record in records]
        decoded = self._decoder.separate(blobs, [record for _, record in records], self._image_size)
        if decoded.failures:
            self._note(records, decoded.failures)
        return from_pixels(decoded.pixels).to(self._device)

    def training_batch(self, step: int, batch_size: int) -> torch.Tensor:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return self.load(self.training[sample_indices(positions, len(self.training), self._seed)])

    def _note(self, records: list[tuple[int, ImageRecord]], failures: dict[int, str]) -> None:
        for place, error in failures.items():
            index, record = records[place]
            key, shard = readable(record.key), readable(record.shard)
            self.bad[index] = Failure(index, key, shard, "decode", error, record.name)
        self._tally.check(list(self.bad.values()))


def _levels(image_size: int, downsample: int) -> int:
    levels = int(math.log2(max(1, downsample)))
    if 2**levels != downsample or downsample < 2 or image_size % downsample or image_size < 1:
        rule = f"must be a power of 2, at least 2, that divides --image-size {image_size}"
        raise ConfigError(f"--downsample {downsample} {rule}; change one of the two")
    return levels


def _training(model: Any, device: torch.device, learning_rate: float, steps: int) -> Training:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    return Training(model, optimizer, schedule, device)


def _fit(
    training: Training, pictures: _Pictures, folder: TrainingFolder, steps: range, batch_size: int, kl_weight: float
) -> None:
    """Do these steps; save now and then, and at the end."""
    saved_at, pause = time.monotonic(), _SAVE_SECONDS
    with progress(steps.stop, "step", "train-vae", initial=steps.start) as bar:
        for step in steps:
            images = pictures.training_batch(step, batch_size)
            if len(images):  # else all of the batch are bad
                error = _step(training, images, kl_weight)
            bar.update()
            if step % 20 == 0 and len(images):
                bar.set_postfix(psnr=f"{_psnr(error.item()):.2f}", refresh=False)
            if step + 1 == steps.stop or time.monotonic() - saved_at >= pause:
                began = time.monotonic()
                folder.save(training, step + 1, [dataclasses.asdict(failure) for failure in pictures.bad.values()])
                saved_at = time.monotonic()
                pause = max(_SAVE_SECONDS, 20 * (saved_at - began))


def _step(training: Training, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """One step of the optimizer; the mean square error before it, on its device."""
    model = training.model
    posterior = model.encode(images).latent_dist
    latents = posterior.sample()
    error = functional.mse_loss(model.decode(latents).sample, images)
    loss = error + kl_weight * posterior.kl().sum() / latents.numel()
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    training.optimizer.step()
    training.schedule.step()
    return error.detach()


@torch.no_grad()
def _held_back_psnr(model: Any, pictures: _Pictures, batch_size: int) -> tuple[float, float]:
    """PSNR in dB of reconstructions from the posterior's mean, and from samples of it."""
    errors, number = np.zeros(2), 0
    for chunk in _chunks(pictures.held_back, batch_size):
        images = pictures.load(chunk)
        if not len(images):
            continue
        number += len(images)
        posterior = model.encode(images).latent_dist
        for column, latents in enumerate((posterior.mean, posterior.sample())):
            restored = model.decode(latents).sample.clamp(-1.0, 1.0)
            errors[column] += functional.mse_loss(restored, images).item() * len(images)
    by_mean, by_sample = errors / number if number else errors * math.nan
    return _psnr(by_mean), _psnr(by_sample)


@torch.no_grad()
def _latent_mean_and_std(model: Any, pictures: _Pictures, batch_size: int) -> tuple[float, float]:
    """Over all training images, places and channels, of samples of the posterior."""
    number, total, squares = 0, 0.0, 0.0
    for chunk in _chunks(pictures.training, batch_size):
        images = pictures.load(chunk)
        if not len(images):
            continue
        latents = model.encode(images).latent_dist.sample().double()
        number += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    if not number:
        raise DataError(f"none of the {len(pictures.training)} training images can be decoded; check the source")
    mean = total / number
    return mean, math.sqrt(squares / number - mean**2)


def _psnr(mean_square_error: float) -> float:
    """In dB for values in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(mean_square_error, 1e-12))


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]
