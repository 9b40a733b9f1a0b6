"""`ecar-data train-vae`: a small KL autoencoder (diffusers' AutoencoderKL) on the user's own image shards."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_tools.encode import resolve_device
from data_tools.progress import progress
from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.images import ImageDecoder, open_decoder
from ecar_dist.data.order import sample_indices
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import temporary_beside
from ecar_dist.vae.pixels import from_pixels
from ecar_dist.vae.pretrained import new_autoencoder, save_autoencoder

_HELD_BACK = 256  # images that never train the autoencoder, at most a tenth of them


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
) -> None:
    """Loss: squared error per pixel value + kl_weight x KL per latent value. Prints PSNR on images held back.

    Raises DataError for an occupied OUT, ConfigError where the sizes do not fit.
    """
    if out.exists():
        raise DataError(f"{out} exists; remove it or give another folder")
    levels = _levels(image_size, downsample)
    torch.manual_seed(seed)
    target = torch.device(resolve_device(device))
    pictures = _Pictures(ImageShards(shards), open_decoder(decoder), image_size, target, seed)
    widths = [channels * min(2, 2**level) for level in range(levels + 1)]
    model = new_autoencoder(widths, latent_channels, layers_per_block=1).to(target)
    _fit(model, pictures, steps, batch_size, learning_rate, kl_weight)
    by_mean, by_sample = _held_back_psnr(model.eval(), pictures, batch_size)
    mean, std = _latent_mean_and_std(model, pictures, batch_size)
    _save(model, out, scaling_factor=1.0 / std, shift_factor=mean)
    latent_side = image_size // downsample
    print(
        f"{out}: latents {latent_channels}x{latent_side}x{latent_side}, scaling_factor {1 / std:.5f}, shift_factor "
        f"{mean:.5f}; PSNR on {len(pictures.held_back)} held-back images {by_mean:.2f} dB, of posterior samples "
        f"{by_sample:.2f} dB"
    )


class _Pictures:
    """Decoded batches in [-1, 1], and the split of the images into training and held back."""

    def __init__(
        self, shards: ImageShards, decoder: ImageDecoder, image_size: int, device: torch.device, seed: int
    ) -> None:
        self._shards, self._decoder, self._image_size, self._device = shards, decoder, image_size, device
        self._seed = seed
        mixed = sample_indices(np.arange(len(shards)), len(shards), seed)
        number = max(1, min(_HELD_BACK, len(shards) // 10))
        self.held_back, self.training = mixed[:number], mixed[number:]

    def load(self, indices: np.ndarray) -> torch.Tensor:
        """Float32 [B, 3, S, S]."""
        records = [self._shards.read(int(index)) for index in indices]
        blobs, keys = [record.data for record in records], [record.where for record in records]
        return from_pixels(self._decoder.decode_to_batch(blobs, keys, self._image_size)).to(self._device)

    def training_batch(self, step: int, batch_size: int) -> torch.Tensor:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return self.load(self.training[sample_indices(positions, len(self.training), self._seed)])


def _levels(image_size: int, downsample: int) -> int:
    levels = int(math.log2(max(1, downsample)))
    if 2**levels != downsample or downsample < 2 or image_size % downsample or image_size < 1:
        rule = f"must be a power of 2, at least 2, that divides --image-size {image_size}"
        raise ConfigError(f"--downsample {downsample} {rule}; change one of the two")
    return levels


def _fit(model: Any, pictures: _Pictures, steps: int, batch_size: int, learning_rate: float, kl_weight: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    with progress(steps, "step", "train-vae") as bar:
        for step in range(steps):
            images = pictures.training_batch(step, batch_size)
            posterior = model.encode(images).latent_dist
            latents = posterior.sample()
            error = functional.mse_loss(model.decode(latents).sample, images)
            loss = error + kl_weight * posterior.kl().sum() / latents.numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(psnr=f"{_psnr(error.item()):.2f}", refresh=False)


@torch.no_grad()
def _held_back_psnr(model: Any, pictures: _Pictures, batch_size: int) -> tuple[float, float]:
    """PSNR in dB of reconstructions from the posterior's mean, and from samples of it."""
    errors = np.zeros(2)
    for chunk in _chunks(pictures.held_back, batch_size):
        images = pictures.load(chunk)
        posterior = model.encode(images).latent_dist
        for column, latents in enumerate((posterior.mean, posterior.sample())):
            restored = model.decode(latents).sample.clamp(-1.0, 1.0)
            errors[column] += functional.mse_loss(restored, images).item() * len(chunk)
    by_mean, by_sample = errors / len(pictures.held_back)
    return _psnr(by_mean), _psnr(by_sample)


@torch.no_grad()
def _latent_mean_and_std(model: Any, pictures: _Pictures, batch_size: int) -> tuple[float, float]:
    """Over all training images, places and channels, of samples of the posterior."""
    number, total, squares = 0, 0.0, 0.0
    for chunk in _chunks(pictures.training, batch_size):
        latents = model.encode(pictures.load(chunk)).latent_dist.sample().double()
        number += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    mean = total / number
    return mean, math.sqrt(squares / number - mean**2)


def _save(model: Any, out: Path, scaling_factor: float, shift_factor: float) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    working = temporary_beside(out)
    try:
        save_autoencoder(model, working, scaling_factor, shift_factor)
        os.rename(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _psnr(mean_square_error: float) -> float:
    """In dB for values in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(mean_square_error, 1e-12))


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]
