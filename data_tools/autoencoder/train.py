"""`ecar-data train-vae`: train a small KL autoencoder (AutoencoderKL of diffusers) on the user's own image shards.

The state is saved during training. After a kill, the same command resumes, and on a CPU it ends with the same weights,
bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_tools.autoencoder.pictures import Pictures
from data_tools.autoencoder.state import Training, TrainingFolder
from data_tools.autoencoder.steps import one_cycle, run_steps, update
from data_tools.encode.settings import resolve_device
from data_tools.failures import ERRORS_NAME, MAX_BAD, FailureTally
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.formats import background_name, parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.pretrained import NORM_GROUPS, new_autoencoder, save_autoencoder


@dataclass(frozen=True)
class TrainVaeSettings:
    """The options that determine the weights. A resumed run must have the same ones.

    Raises ConfigError for sizes that do not fit.
    """

    image_size: int  # side in pixels
    downsample: int  # image pixels per side of a latent pixel
    latent_channels: int
    channels: int  # width of the network at full resolution
    steps: int
    batch_size: int
    learning_rate: float
    kl_weight: float  # per latent value
    seed: int
    decoder: str
    device: str
    background: str = "white"

    def __post_init__(self) -> None:
        downsample = self.downsample
        if downsample < 2 or 2**self.levels != downsample or self.image_size < 1 or self.image_size % downsample:
            raise ConfigError(
                f"--downsample {downsample} must be a power of 2, at least 2, and divide --image-size "
                f"{self.image_size}; change one of the two"
            )
        if self.channels % NORM_GROUPS:
            raise ConfigError(
                f"--channels {self.channels} is not a multiple of {NORM_GROUPS}; give e.g. {8 * NORM_GROUPS}"
            )

    @property
    def levels(self) -> int:
        """Number of halvings."""
        return int(math.log2(max(1, self.downsample)))


def train_vae(shards: Path, out: Path, *, max_bad: float = MAX_BAD, **settings: Any) -> None:
    """Train on image shards and write an autoencoder to OUT. `settings`: the fields of TrainVaeSettings.

    The loss is the squared error per pixel value + kl_weight x KL divergence per latent value. Prints the PSNR on
    images that were held back. Bad images are left out and listed in OUT/errors.jsonl. Raises DataError if there
    are more than max_bad x count of them, or if OUT contains anything but an unfinished run of the same command;
    ConfigError for settings that do not fit.
    """
    chosen = TrainVaeSettings(**settings)
    colour = parse_background(chosen.background)
    target = torch.device(resolve_device(chosen.device))
    images = ImageShards(shards)

    # The state of an unfinished run must agree with this.
    identity = {
        **dataclasses.asdict(chosen),
        "source": images.manifest.dataset_id,
        "device": target.type,
        "background": background_name(colour),
    }
    folder = TrainingFolder(out, identity)
    tally = FailureTally(out, len(images), max_bad)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(chosen.seed)
    decoder = open_decoder(chosen.decoder, background=colour)
    pictures = Pictures(images, decoder, chosen.image_size, target, chosen.seed, tally)
    training = _new_training(chosen, target)
    done, bad = folder.restore(training)
    pictures.recall_bad(bad)

    # Train, then measure. The list of errors is written even if this fails.
    try:
        run_steps(
            training,
            pictures,
            folder,
            range(done, chosen.steps),
            chosen.batch_size,
            step=functools.partial(_step, kl_weight=chosen.kl_weight),
            label="train-vae",
            shown=lambda error: f"psnr={_psnr(error):.2f}",
        )
        by_mean, by_sample = _held_back_psnr(training.model.eval(), pictures, chosen.batch_size)
        mean, std = _latent_mean_and_std(training.model, pictures, chosen.batch_size)
    finally:
        pictures.list_bad(out)
    folder.finish(lambda path: save_autoencoder(training.model, path, scaling_factor=1.0 / std, shift_factor=mean))

    side = chosen.image_size // chosen.downsample
    left_out = f"; {len(pictures.bad)} bad images left out, listed in {out / ERRORS_NAME}" if pictures.bad else ""
    print(
        f"{out}: latents {chosen.latent_channels}x{side}x{side}, scaling_factor {1 / std:.5f}, shift_factor "
        f"{mean:.5f}; PSNR on {len(pictures.held_back)} held-back images {by_mean:.2f} dB, of posterior samples "
        f"{by_sample:.2f} dB{left_out}"
    )


def _new_training(settings: TrainVaeSettings, device: torch.device) -> Training:
    """An untrained autoencoder with its optimizer. The levels below full resolution have twice the width."""
    widths = [settings.channels * min(2, 2**level) for level in range(settings.levels + 1)]
    model = new_autoencoder(widths, settings.latent_channels, layers_per_block=1).to(device)
    return Training(model, *one_cycle(model.parameters(), settings.learning_rate, settings.steps), device)


def _step(training: Training, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """One optimizer step. Returns the mean squared error before the step, a scalar on the device."""
    model = training.model
    posterior = model.encode(images).latent_dist
    latents = posterior.sample()
    error = functional.mse_loss(model.decode(latents).sample, images)
    loss = error + kl_weight * posterior.kl().sum() / latents.numel()
    update(training, loss, model.parameters())
    return error.detach()


@torch.no_grad()
def _held_back_psnr(model: Any, pictures: Pictures, batch_size: int) -> tuple[float, float]:
    """PSNR in dB of reconstructions from the posterior mean, and from posterior samples."""
    errors = np.zeros(2)
    number = 0
    for images in pictures.held_back_batches(batch_size):
        number += len(images)
        posterior = model.encode(images).latent_dist
        for column, latents in enumerate((posterior.mean, posterior.sample())):
            restored = model.decode(latents).sample.clamp(-1.0, 1.0)
            errors[column] += functional.mse_loss(restored, images).item() * len(images)
    by_mean, by_sample = errors / number if number else errors * math.nan
    return _psnr(by_mean), _psnr(by_sample)


@torch.no_grad()
def _latent_mean_and_std(model: Any, pictures: Pictures, batch_size: int) -> tuple[float, float]:
    """Mean and std of posterior samples, over all training images, positions and channels."""
    number = 0
    total = 0.0
    squares = 0.0
    for images in pictures.training_batches(batch_size):
        latents = model.encode(images).latent_dist.sample().double()
        number += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    if not number:
        raise DataError(f"none of the {len(pictures.training)} training images can be decoded; check the source")
    mean = total / number
    return mean, math.sqrt(squares / number - mean**2)


def _psnr(mean_square_error: float) -> float:
    """In dB, for values in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(mean_square_error, 1e-12))
