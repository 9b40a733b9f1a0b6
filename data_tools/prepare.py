"""`ecar-data prepare`: from images to finished latent shards in one command. Run it again to resume.

It runs `shard`, `train-vae`, `encode` and `finalize`, prints each of them as a command, and skips those that are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools import cli
from data_tools.autoencoder.state import STATE_NAME
from data_tools.encode.settings import latent_side, propose_image_size, resolve_device
from data_tools.failures import MAX_BAD, FailureTally
from data_tools.images.index import read_class_names
from data_tools.images.shard import check_holdout
from data_tools.images.tar_samples import LabelRule
from ecar_dist.data.images.formats import parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.prepared import HELDOUT, HELDOUT_LATENTS, IMAGES, LATENTS, RECORD_NAME, TRAIN, VAE
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_manifest
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import write_json
from ecar_dist.storage.node_lock import try_lock
from ecar_dist.storage.redaction import redact, redact_text
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, UntrustedError, parse_object, read_plain_file
from ecar_dist.vae.build import open_codec_by_spec

TRAINED = "train"  # as --vae: train an autoencoder on the images
_LARGEST_PROPOSED = 256  # pixels; larger images need --image-size
_SMALLEST_SIDE = 4  # latent pixels of a proposed size: three stages of 1, 2 and 4
_FINE_SIZE = 64  # pixels; up to this size a trained autoencoder downsamples by 4, above it by 8


@dataclass(frozen=True)
class PrepareSettings:
    """The options that determine the result. A repeated command must have the same ones."""

    vae: str
    vae_steps: int = 250  # of --vae train
    vae_channels: int = 4  # of its latents
    image_size: int | None = None  # None: derived from the images
    holdout: float = 0.1
    seed: int = 0
    flip: str = "none"
    background: str = "white"
    label: str = "cls"
    classes: str | None = None
    flat: bool = False

    def downsample(self, image_size: int | None) -> int:
        """Image pixels per side of a latent pixel. Opens the autoencoder; raises ConfigError if there is none."""
        if self.vae != TRAINED:
            return open_codec_by_spec(self.vae).identity.downsample
        return 4 if image_size is None or image_size <= _FINE_SIZE else 8

    def check(self) -> None:
        """Raises ConfigError, before the first step starts, for what a later step would refuse."""
        check_holdout(self.holdout)
        parse_background(self.background)
        LabelRule.parse(self.label, read_class_names(None if self.classes is None else Path(self.classes)))
        downsample = self.downsample(self.image_size)
        if self.image_size is not None:
            latent_side(self.image_size, downsample)


def prepare(
    source: str,
    out: Path,
    *,
    max_bad: float = MAX_BAD,
    device: str = "auto",
    classes: Path | None = None,
    **options: Any,
) -> None:
    """Make OUT/images, OUT/vae (with --vae train), OUT/latents and OUT/heldout_latents.

    `options`: the fields of PrepareSettings.
    Raises the errors of the commands, and DataError if OUT was started with other options or contains anything else.
    """
    settings = PrepareSettings(classes=None if classes is None else str(classes), **options)
    FailureTally(out, 0, max_bad)  # refuses a share outside its range
    resolve_device(device)
    settings.check()
    with _claimed(out, source, settings):
        steps = _Steps(source, out, settings, max_bad, device)
        steps.shard()
        steps.train_vae()
        for images, latents in steps.encodings():
            steps.encode(images, latents)
            steps.finalize(latents)

    manifest = load_manifest(out / LATENTS)
    print(f"{out}: {manifest.count} samples of {manifest.num_classes} classes; next:")
    print(f"  ecar-dist init {shlex.quote(str(out))} > mine.yaml")
    print("  ecar-dist train mine.yaml")


@contextlib.contextmanager
def _claimed(out: Path, source: str, settings: PrepareSettings) -> Iterator[None]:
    """Claim OUT for this command and these settings alone. Raises DataError if that is not possible."""
    # A folder with other content is not touched.
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a folder; give another one")
    path = out / RECORD_NAME
    if out.is_dir() and not path.exists() and (others := sorted(p.name for p in out.iterdir() if p.name[0] != ".")):
        raise DataError(f"{out} contains {others[0]} and has no {RECORD_NAME}; remove it or give another folder")
    out.mkdir(parents=True, exist_ok=True)

    with open(out / ".prepare.lock", "ab") as lock:
        if not try_lock(lock):
            raise DataError(f"another `ecar-data prepare` is writing {out}; wait for it, or give another folder")

        # The first command stored its settings. A command with different ones would mix two sets.
        wanted = {"source": redact(source), **dataclasses.asdict(settings)}
        found = _read_record(path) if path.exists() else wanted
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}  # older versions lack some
        for name, value in wanted.items():
            if found.get(name, defaults.get(name)) != value:
                option = name if name == "source" else f"--{name.replace('_', '-')}"
                raise DataError(
                    f"{out} was started with {option} {found.get(name)}, this command has {value}; repeat the first "
                    "command, or give another folder"
                )
        write_json(path, wanted)
        yield


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_plain_file(path, MAX_JSON_BYTES))
    except UntrustedError as error:
        raise DataError(f"{path} is damaged ({error}); remove {path.parent} and run the command again") from None


@dataclass
class _Steps:
    """The individual commands, in order. Each prints itself, and is skipped if its result exists."""

    source: str
    out: Path
    settings: PrepareSettings
    max_bad: float
    device: str
    number: int = 0  # of the last step

    @property
    def images(self) -> Path:
        """The image shards to train on."""
        return self.out / IMAGES / TRAIN if self.settings.holdout else self.out / IMAGES

    def encodings(self) -> list[tuple[Path, Path]]:
        """Image shards and the folder of their latents: to train on, and for the validation loss."""
        heldout = [(self.out / IMAGES / HELDOUT, self.out / HELDOUT_LATENTS)] if self.settings.holdout else []
        return [(self.images, self.out / LATENTS), *heldout]

    @property
    def vae(self) -> str:
        return str(self.out / VAE) if self.settings.vae == TRAINED else self.settings.vae

    @property
    def image_size(self) -> int:
        if self.settings.image_size is not None:
            return self.settings.image_size
        downsample = self.settings.downsample(None)
        with contextlib.closing(ImageShards(self.images)) as images:
            proposed = propose_image_size(images, downsample)
        return max(_SMALLEST_SIDE * downsample, min(_LARGEST_PROPOSED, proposed))

    def shard(self) -> None:
        chosen = self.settings
        words = ["shard", self.source, self.out / IMAGES, "--holdout", f"{chosen.holdout:g}"]
        words += _options(seed=chosen.seed, label=chosen.label, classes=chosen.classes)
        words += ["--flat"] * chosen.flat
        self._run("image shards", (self.images / MANIFEST_NAME).exists(), words)

    def train_vae(self) -> None:
        if self.settings.vae != TRAINED:
            print(f"{self._next()} autoencoder: {self.vae}, no training", flush=True)
            return
        folder = Path(self.vae)
        size = self.image_size
        words = ["train-vae", self.images, folder]
        words += ["--image-size", size, "--downsample", self.settings.downsample(size)]
        words += _options(steps=self.settings.vae_steps, seed=self.settings.seed)
        words += _options(latent_channels=self.settings.vae_channels)
        words += _options(background=self.settings.background, device=self.device)
        done = (folder / "config.json").exists() and not (folder / STATE_NAME).exists()
        self._run("autoencoder", done, words)

    def encode(self, images: Path, latents: Path) -> None:
        chosen = self.settings
        words = ["encode", images, latents, "--vae", self.vae, "--image-size", self.image_size]
        words += _options(seed=chosen.seed, flip=chosen.flip, background=chosen.background, device=self.device)
        self._run(f"latents of {images}", (latents / MANIFEST_NAME).exists(), words)

    def finalize(self, latents: Path) -> None:
        self._run(f"manifest of {latents}", (latents / MANIFEST_NAME).exists(), ["finalize", latents])

    def _next(self) -> str:
        self.number += 1
        return f"[{self.number}/{2 + 2 * len(self.encodings())}]"

    def _run(self, title: str, done: bool, words: Sequence[Any]) -> None:
        """Print the command, then run exactly what was printed."""
        if done:
            print(f"{self._next()} {title}: already done", flush=True)
            return
        words = [*map(str, words), *_options(max_bad=self.max_bad)]
        print(f"{self._next()} {title}\n$ {redact_text(shlex.join(['ecar-data', *words]))}", flush=True)
        cli.run(words)


def _options(**values: Any) -> list[str]:
    """Command-line options for the values that differ from the defaults of the commands."""
    given = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


_DEFAULTS = {
    "steps": 250,
    "latent_channels": 4,
    "seed": 0,
    "label": "cls",
    "classes": None,
    "flip": "none",
    "background": "white",
    "device": "auto",
    "max_bad": MAX_BAD,
}
