"""`ecar-data train-vae`: train a small KL autoencoder (AutoencoderKL of diffusers) on the user's own image shards.

The state is saved during training. After a kill, the same command resumes, and on a CPU it ends with the same weights,
bit by bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_tools.encode.settings import resolve_device
from data_tools.failures import ERRORS_NAME, MAX_BAD, Failure, FailureTally
from data_tools.progress import progress
from data_tools.train_vae_state import Training, TrainingFolder
from ecar_dist.data.images.decode import ImageDecoder, open_decoder
from ecar_dist.data.images.formats import background_name, parse_background
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.order.lanes import sample_indices
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.vae.pixels import from_pixels
from ecar_dist.vae.pretrained import NORM_GROUPS, new_autoencoder

_HELD_BACK = 256  # images that are not trained on, or a tenth of the set if that is less
_SAVE_SECONDS = 30.0  # between two saves; longer if saving takes more than 5 % of the time


@dataclass(frozen=True)
class TrainVaeSettings:
    """The options that decide the weights. A resumed training must have the same ones.

    Raises ConfigError for sizes that do not fit.
    """

    image_size: int  # side in pixels
    downsample: int  # image pixels per latent pixel side
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
    images that were held back. Bad images are left out and listed in OUT/errors.jsonl. Raises DataError if they are
    more than max_bad x count, and if OUT holds anything but an unfinished training by the same command; ConfigError for
    settings that do not fit.
    """
    chosen = TrainVaeSettings(**settings)
    colour = parse_background(chosen.background)
    target = torch.device(resolve_device(chosen.device))
    images = ImageShards(shards)

    # What the state of an unfinished training must agree with.
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
    pictures = _Pictures(images, decoder, chosen.image_size, target, chosen.seed, tally)
    training = _new_training(chosen, target)
    done, bad = folder.restore(training)
    pictures.bad = {failure["row"]: Failure(**failure) for failure in bad}

    # Train, then measure. The list of errors is written even if this ends in an error.
    try:
        _fit(training, pictures, folder, range(done, chosen.steps), chosen)
        by_mean, by_sample = _held_back_psnr(training.model.eval(), pictures, chosen.batch_size)
        mean, std = _latent_mean_and_std(training.model, pictures, chosen.batch_size)
    finally:
        tally.write(list(pictures.bad.values()))
    folder.finish(training.model, scaling_factor=1.0 / std, shift_factor=mean)

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
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    return Training(model, optimizer, schedule, device)


class _Pictures:
    """Batches of decoded images, split into training images and held-back ones."""

    def __init__(
        self,
        shards: ImageShards,
        decoder: ImageDecoder,
        image_size: int,
        device: torch.device,
        seed: int,
        tally: FailureTally,
    ) -> None:
        self.bad: dict[int, Failure] = {}  # by index; they are not read again
        self._shards = shards
        self._decoder = decoder
        self._image_size = image_size
        self._device = device
        self._seed = seed
        self._tally = tally
        if len(shards) < 2:
            raise DataError(f"the set has {len(shards)} image, train-vae needs at least 2, because some are held back")

        # The held-back images are a random choice, at least one.
        mixed = sample_indices(np.arange(len(shards)), len(shards), seed)
        number = max(1, min(_HELD_BACK, len(shards) // 10))
        self.held_back = mixed[:number]
        self.training = mixed[number:]

    def load(self, indices: np.ndarray) -> torch.Tensor:
        """The good ones, float32 [G, 3, S, S] in [-1, 1]. Raises DataError if too many are bad."""
        # Pairs, not a dict: a batch across the end of an epoch may hold an image twice.
        records = [(index, self._shards.read(index)) for index in map(int, indices) if index not in self.bad]
        blobs = [record.data for _, record in records]
        decoded = self._decoder.separate(blobs, [record for _, record in records], self._image_size)
        if decoded.failures:
            self._note_failures(records, decoded.failures)
        return from_pixels(decoded.pixels).to(self._device)

    def training_batch(self, step: int, batch_size: int) -> torch.Tensor:
        """The batch of a step: every epoch has another order, given by the seed."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return self.load(self.training[sample_indices(positions, len(self.training), self._seed)])

    def _note_failures(self, records: list[tuple[int, ImageRecord]], failures: dict[int, str]) -> None:
        for place, error in failures.items():
            index, record = records[place]
            self.bad[index] = Failure(index, readable(record.key), readable(record.shard), "decode", error, record.name)
        self._tally.check(list(self.bad.values()))


def _fit(
    training: Training, pictures: _Pictures, folder: TrainingFolder, steps: range, settings: TrainVaeSettings
) -> None:
    """Do these steps. Save regularly and at the end."""
    saved_at = time.monotonic()
    pause = _SAVE_SECONDS
    with progress(steps.stop, "step", "train-vae", initial=steps.start) as bar:
        for step in steps:
            images = pictures.training_batch(step, settings.batch_size)
            if len(images):  # otherwise all images of the batch are bad
                error = _step(training, images, settings.kl_weight)
            bar.update()
            if step % 20 == 0 and len(images):
                bar.set_postfix(psnr=f"{_psnr(error.item()):.2f}", refresh=False)

            # Save, but spend at most about 5 % of the time on it.
            if step + 1 == steps.stop or time.monotonic() - saved_at >= pause:
                began = time.monotonic()
                folder.save(training, step + 1, [dataclasses.asdict(failure) for failure in pictures.bad.values()])
                saved_at = time.monotonic()
                pause = max(_SAVE_SECONDS, 20 * (saved_at - began))


def _step(training: Training, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """One optimizer step. Returns the mean squared error before the step, a scalar on the device."""
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
    """PSNR in dB of reconstructions from the mean of the posterior, and from samples of it."""
    errors = np.zeros(2)
    number = 0
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
    """Of samples of the posterior, over all training images, positions and channels."""
    number = 0
    total = 0.0
    squares = 0.0
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
    """In dB, for values in [-1, 1]."""
    return 10.0 * math.log10(4.0 / max(mean_square_error, 1e-12))


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]
