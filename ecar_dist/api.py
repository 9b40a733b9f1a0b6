"""The Python interface: what `import ecar_dist` offers. Everything else may change from version to version."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ecar_dist.config.read import load_config
from ecar_dist.data.order.stream import Locations
from ecar_dist.data.sources import LatentSource
from ecar_dist.errors import ConfigError, TrainingError
from ecar_dist.sample.load import TrainedModel, open_trained
from ecar_dist.sample.pictures import decode_stages
from ecar_dist.storage.untrusted import printable
from ecar_dist.vae.codec import EncoderIdentity, normalise

Label = int | str | None
Labels = Label | Sequence[Label]


def load(
    path: str | Path, *, step: int | None = None, ema: str | None = None, device: str | torch.device | None = None
) -> Model:
    """Open a trained model.

    Args:
        path: a run directory, the folder of one of its checkpoints, or an export.
        step: optimizer step of the checkpoint or EMA snapshot; the newest intact checkpoint by default.
        ema: which weights: ``"ema"``, ``"ema1"``, ...; ``"raw"`` for those without an EMA; ``"half-life=200000"`` or
            ``"sigma-rel=0.1"`` for an EMA that is rebuilt if the run did not keep it. The first EMA by default.
        device: ``"cuda"``, ``"cpu"``, ...; a GPU if there is one by default.

    Raises:
        ecar_dist.errors.EcarError: ``path`` is none of these, is damaged, or has no such weights.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(open_trained(Path(path), torch.device(device or default), step=step, ema=ema))


class Model:
    """A trained model with its autoencoder, ready to sample. Created by :func:`load`.

    Images are bit-identical to those of ``ecar-dist sample`` with the same options: image *i* is a function of its
    label, the seed and the settings.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 to ``num_classes - 1``."""
        return self._trained.classes.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class, or ``None`` for an old model, trained before names were stored."""
        names = self._trained.classes.names
        return None if names is None else list(names)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self._trained.config.data.latent_size * self._trained.codec.identity.downsample

    @property
    def samples_seen(self) -> int:
        """Training samples that the weights have seen."""
        return self._trained.progress.samples_seen

    def sample(
        self,
        labels: Labels = None,
        *,
        count: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draw one image for each label.

        Args:
            labels: one label or several: class numbers, class names, or ``None`` for the unconditional model.
            count: number of images, cycling through the labels; one for each label by default.
            seed: seed of the noise.
            batch_size: number of images drawn at once.
            settings: values of the config's section ``sample``, such as ``guidance_scale=3``, ``solver="heun"``,
                ``steps_per_stage=[4, 8, 16]``, ``time_shift=2`` or ``guidance_interval=(0.3, 0.9)``.

        Returns:
            RGB images of ``image_size`` x ``image_size`` pixels.

        Raises:
            ecar_dist.errors.ConfigError: an unknown label or setting, or a value that breaks a rule.
        """
        return self._draw(labels, count, seed, batch_size, settings, last_only=True)[-1]

    def stages(
        self,
        labels: Labels = None,
        *,
        count: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> list[list[Image.Image]]:
        """Draw as :meth:`sample` does, and return the images of every stage, coarse to fine.

        Each is the partially denoised latent of its stage, upsampled and decoded. The last ones are the samples.
        """
        return self._draw(labels, count, seed, batch_size, settings, last_only=False)

    def _draw(
        self,
        labels: Labels,
        count: int | None,
        seed: int,
        batch_size: int,
        settings: Mapping[str, Any],
        last_only: bool,
    ) -> list[list[Image.Image]]:
        # What is drawn, and how.
        trained = self._trained.with_settings(settings)
        wanted_labels = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
        classes = [trained.classes.label(label) for label in wanted_labels]
        wanted = len(classes) if count is None else count
        if not classes or wanted < 1 or batch_size < 1:
            given = f"{len(classes)} labels, count={count}, batch_size={batch_size}"
            raise ConfigError(f"nothing to draw: {given}; each must be at least 1")

        # Draw and decode batch by batch.
        stages: list[list[Image.Image]] = []
        drawn = trained.draw([classes[i % len(classes)] for i in range(wanted)], seed, batch_size)
        for batch in drawn:
            pictures = decode_stages(trained.codec, batch[-1:] if last_only else batch)
            stages = stages or [[] for _ in pictures]
            for stage, arrays in zip(stages, pictures, strict=True):
                stage += [Image.fromarray(picture) for picture in arrays]
        return stages

    def __repr__(self) -> str:
        kind, preset = self._trained.config.model.kind, self._trained.config.model.preset
        return f"Model({kind} {preset}, {self.num_classes} classes, {self._trained.source})"


def fit(config: str | Path | Mapping[str, Any], *overrides: str, processes: int = 1, adopt: bool = False) -> Path:
    """Train, or resume training: ``ecar-dist train`` in separate processes, whose output is printed.

    Args:
        config: path of a YAML file, or its content as nested dicts.
        overrides: values that replace those of the config, such as ``"train.total_samples=4096"``.
        processes: ranks on this machine; with more than one, torchrun starts them.
        adopt: start from checkpoints that another run saved, as ``--adopt`` does.

    Returns:
        The run directory, for :func:`load`.

    Raises:
        ecar_dist.errors.ConfigError: the config breaks a rule.
        ecar_dist.errors.TrainingError: training ended early; the message has the exit status and the last error.
    """
    with contextlib.ExitStack() as ends:
        if isinstance(config, Mapping):
            file = ends.enter_context(tempfile.NamedTemporaryFile("w", suffix=".yaml"))
            file.write(yaml.safe_dump(_plain(config)))
            file.flush()
            config = file.name
        run = load_config(config, overrides).run_directory
        if processes < 1:
            raise ConfigError(f"processes={processes} must be at least 1")

        # In a notebook, this process outlives the training, which must release its memory and its ports.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ecar_dist", "train", str(config)]
        command += [*overrides, *(["--adopt"] if adopt else [])]
        status, error = _run_printed(command)
    if status:
        raise TrainingError(f"training ended with exit status {status}: {error or 'see the output above'}")
    return run


def _plain(tree: Any) -> Any:
    """Mappings and sequences as the dicts and lists of YAML, paths as text."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [_plain(value) for value in tree]
    return str(tree) if isinstance(tree, Path) else tree


def _run_printed(command: list[str]) -> tuple[int, str]:
    """Run a command and print its output as it comes; returns its exit status and its last error line.

    `print` reaches a notebook, where the file descriptors of this process lead elsewhere.
    """
    error = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("ecar-dist: "):
                    error = printable(line.removeprefix("ecar-dist: ").strip(), 1000)
        except KeyboardInterrupt:
            process.terminate()  # it saves a checkpoint first
            process.wait()
            raise
    return process.returncode, error


class Dataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A set of latent shards as a map-style PyTorch dataset: ``dataset[i]`` is ``(latent, label)``.

    A latent is the mean of the autoencoder's posterior, scaled as the model sees it: float32 [C, H, W]. The order is
    that of the shards. Training itself reads the same files in a different order.

    Args:
        folder: folder or URL of latent shards, with their ``manifest.json``.
        mirrored: the latents of the mirrored images, if the set has them (``ecar-data encode --flip store``).

    Raises:
        ecar_dist.errors.DataError: the set is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path, *, mirrored: bool = False) -> None:
        self._source = LatentSource(str(folder))
        manifest = self._source.manifest
        if mirrored and not manifest.has_flip:
            raise ConfigError(
                f"{folder} has no mirrored latents; leave mirrored out, or encode with `ecar-data encode --flip store`"
            )
        self._mirrored = mirrored
        self._encoder = EncoderIdentity.from_dict(manifest.encoder)
        self._ends = np.cumsum(self._source.shard_counts)

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 to ``num_classes - 1``."""
        return self._source.manifest.num_classes

    @property
    def class_names(self) -> list[str]:
        """The name of each class."""
        return list(self._source.manifest.class_names)

    def __len__(self) -> int:
        return self._source.manifest.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (latent,), (label,) = self.__getitems__([index], stacked=True)
        return latent, int(label)

    def __getitems__(self, indices: Sequence[int], *, stacked: bool = False) -> Any:
        """Several samples in one read, for a DataLoader."""
        # Negative indices count from the end, as in a list.
        wanted = np.array([index + len(self) if index < 0 else index for index in indices], dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"index {indices} of a set of {len(self)} samples")

        # Where the samples are.
        shards = np.searchsorted(self._ends, wanted, side="right")
        rows = wanted - np.concatenate(([0], self._ends))[shards]
        locations = Locations(wanted, np.zeros_like(wanted), shards, rows, wanted)
        flip = np.full(len(wanted), True) if self._mirrored else None
        moments, labels = self._source.read(locations, flip)

        # The mean of the posterior: its noise is zero.
        shape = (len(wanted), self._encoder.latent_channels, *moments.shape[2:])
        latents = normalise(self._encoder, moments, torch.zeros(shape))
        if stacked:
            return latents, labels
        return [(latent, int(label)) for latent, label in zip(latents, labels, strict=True)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return (self[index] for index in range(len(self)))
