"""shard -> encode -> finalize -> train -> evaluate: the steps from a folder of images to scores, as jobs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecar_dist.cluster.job_script import Options
from ecar_dist.cluster.resources import Resources
from ecar_dist.cluster.submission import Step
from ecar_dist.config.run import RunConfig
from ecar_dist.data.shards.manifest import MANIFEST_NAME
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.remote import is_remote, local_path

_PATTERN = frozenset("{*?")


@dataclass(frozen=True)
class Pipeline:
    """What a config says about the making of its data, and what it does not."""

    source: str  # folder with a directory per class, tars, an index, or `digits`
    shards: Path  # the folder of train/ and heldout/
    latents: Path
    vae: str
    image_size: int
    holdout: float
    encode_tasks: int
    label: str | None = None
    classes: Path | None = None
    encode_options: tuple[str, ...] = ()

    @property
    def images(self) -> dict[str, str]:
        """Where the images will lie, by field of the config."""
        return {"train_images": str(self.shards / "train"), "heldout_images": str(self.shards / "heldout")}

    def data_steps(self, resources: Resources) -> list[Step]:
        """shard, encode and finalize; one stands where its manifest is there."""
        without_gpu: Options = {} if resources.gpus_per_node else {"gpus": None}
        latents_stand = (self.latents / MANIFEST_NAME).is_file()
        encode, finalize = self._encode(), ["ecar-data", "finalize", str(self.latents)]
        return [
            self._shard(resources),
            Step(
                "encode",
                "encode.sbatch",
                shlex.join(["ecar-data", "encode", *encode, "--tasks", str(self.encode_tasks)]),
                arguments=encode,
                options={**without_gpu, **resources.further, "array": f"0-{self.encode_tasks - 1}"},
                exports={"TASKS": str(self.encode_tasks)},
                log="encode-%A_%a.log",
                stands=latents_stand,
            ),
            Step(
                "finalize",
                "finalize.sbatch",
                shlex.join(finalize),
                arguments=finalize[2:],
                options=resources.further,
                log="finalize-%j.log",
                stands=latents_stand,
            ),
        ]

    def _shard(self, resources: Resources) -> Step:
        words = ["ecar-data", "shard", self.source, str(self.shards), "--holdout", f"{self.holdout:g}"]
        words += ["--label", self.label] if self.label else []
        words += ["--classes", str(self.classes)] if self.classes else []
        manifests = [self.shards / part / MANIFEST_NAME for part in ("train", "heldout")]
        return Step(
            "shard",
            "command.sbatch",
            shlex.join(words),
            arguments=words,
            options=resources.further,
            exports={"DONE": str(manifests[-1])},
            log="shard-%j.log",
            stands=all(path.is_file() for path in manifests),
        )

    def _encode(self) -> list[str]:
        """Arguments of `ecar-data encode`."""
        size = ["--vae", self.vae, "--image-size", str(self.image_size)]
        return [self.images["train_images"], str(self.latents), *size, *self.encode_options]


def evaluation_step(run_directory: Path, resources: Resources) -> Step:
    words = ["ecar-dist", "evaluate", str(run_directory)]
    options = {**({"gpus": "1"} if resources.gpus_per_node else {}), **resources.further}
    return Step(
        "evaluate", "command.sbatch", shlex.join(words), arguments=words, options=options, log="evaluate-%j.log"
    )


def plan_pipeline(
    config: RunConfig,
    source: str,
    *,
    holdout: float,
    encode_tasks: int,
    vae: str | None = None,
    shards: Path | None = None,
    label: str | None = None,
    classes: Path | None = None,
    encode_options: Sequence[str] = (),
) -> Pipeline:
    """Raises ConfigError for whatever the config contradicts, DataError where the source is not there."""
    if not 0.0 < holdout < 1.0:
        raise ConfigError(f"--holdout {holdout:g} is outside (0, 1); give the share of images to score against")
    if config.data.latents is None or is_remote(config.data.latents):
        raise ConfigError(
            f"--pipeline makes one local set of latents, data.latents is {config.data.latents}; set it to a folder, "
            "and send it to a bucket with `ecar-data push` later"
        )
    _check_source(source)
    if classes is not None and not classes.is_file():
        raise DataError(f"--classes {classes} is no file; give a text file with a class name a line")
    return Pipeline(
        source=source,
        shards=_shards(config, shards),
        latents=local_path(config.data.latents),
        vae=_vae(config, vae),
        image_size=config.data.latent_size * config.vae.downsample,
        holdout=holdout,
        encode_tasks=encode_tasks,
        label=label,
        classes=classes,
        encode_options=tuple(encode_options),
    )


def with_images(config: RunConfig, pipeline: Pipeline) -> RunConfig:
    """The config with the images that the pipeline makes, so that `evaluate` finds them."""
    return config.model_copy(update={"data": config.data.model_copy(update=pipeline.images)})


def _check_source(source: str) -> None:
    known = source == "digits" or is_remote(source) or _PATTERN & set(source)
    if not known and not local_path(source).exists():
        raise DataError(f"--pipeline {source} does not exist; give a folder of class directories, or tars")


def _shards(config: RunConfig, given: Path | None) -> Path:
    """The folder that `ecar-data shard` fills. Raises ConfigError where the config has the images elsewhere."""
    configured = {name: getattr(config.data, name) for name in ("train_images", "heldout_images")}
    if given is None and configured["train_images"] is None:
        raise ConfigError("--pipeline needs a folder for image shards; give --shards DIR, or set data.train_images")
    folder = given or local_path(configured["train_images"]).parent
    for name, place in configured.items():
        made = folder / name.removesuffix("_images")
        if place is not None and (is_remote(place) or local_path(place).absolute() != made.absolute()):
            raise ConfigError(f"data.{name}={place}, but the pipeline makes {made}; set data.{name}={made}")
    return folder


def _vae(config: RunConfig, given: str | None) -> str:
    """How `ecar-data encode` is told the config's autoencoder."""
    if config.vae.kind != "dct":
        return given or str(config.vae.path)
    name = f"dct-f{config.vae.downsample}"
    if given not in (None, name):
        raise ConfigError(f"--vae {given}, but the config has {name}; leave --vae out, or change vae.kind")
    return name
