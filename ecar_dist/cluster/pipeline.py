"""shard -> encode -> finalize -> train -> evaluate: the jobs of a pipeline from a folder of images to scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecar_dist.cluster.job_script import Options
from ecar_dist.cluster.resources import Resources
from ecar_dist.cluster.submission import Step
from ecar_dist.config.run import RunConfig
from ecar_dist.data.prepared import BUILT_IN
from ecar_dist.data.shards.manifest import MANIFEST_NAME
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.remote import is_remote, local_path
from ecar_dist.vae.table import CODECS

_GLOB_CHARACTERS = frozenset("{*?")


@dataclass(frozen=True)
class Pipeline:
    """How the data of a config are created."""

    source: str  # folder with a directory per class, tars, an index, or a built-in source such as `digits`
    shards: Path  # the parent of train/ and heldout/
    latents: Path
    vae: str  # as in `ecar-data encode --vae`
    image_size: int  # pixels
    holdout: float  # fraction of the images
    encode_tasks: int
    label: str | None = None
    classes: Path | None = None
    encode_options: tuple[str, ...] = ()

    @property
    def images(self) -> dict[str, str]:
        """The folders of the image shards, by field of the config."""
        return {"train_images": str(self.shards / "train"), "heldout_images": str(self.shards / "heldout")}

    def data_steps(self, resources: Resources) -> list[Step]:
        """shard, encode and finalize. A step is done if its manifest exists."""
        return [self._shard(resources), self._encode(resources), self._finalize(resources)]

    def _shard(self, resources: Resources) -> Step:
        words = ["ecar-data", "shard", self.source, str(self.shards), "--holdout", f"{self.holdout:g}"]
        if self.label:
            words += ["--label", self.label]
        if self.classes:
            words += ["--classes", str(self.classes)]

        # The job ends early if its last manifest exists.
        manifests = [self.shards / part / MANIFEST_NAME for part in ("train", "heldout")]
        return Step(
            "shard",
            "command.sbatch",
            shlex.join(words),
            arguments=words,
            options=resources.further,
            exports={"DONE": str(manifests[-1])},
            log="shard-%j.log",
            done=all(path.is_file() for path in manifests),
        )

    def _encode(self, resources: Resources) -> Step:
        """An array of jobs."""
        words = [self.images["train_images"], str(self.latents)]
        words += ["--vae", self.vae, "--image-size", str(self.image_size), *self.encode_options]
        without_gpu: Options = {} if resources.gpus_per_node else {"gpus": None}
        return Step(
            "encode",
            "encode.sbatch",
            shlex.join(["ecar-data", "encode", *words, "--tasks", str(self.encode_tasks)]),
            arguments=words,
            options={**without_gpu, **resources.further, "array": f"0-{self.encode_tasks - 1}"},
            exports={"TASKS": str(self.encode_tasks)},
            log="encode-%A_%a.log",
            done=self._has_latents,
        )

    def _finalize(self, resources: Resources) -> Step:
        return Step(
            "finalize",
            "finalize.sbatch",
            shlex.join(["ecar-data", "finalize", str(self.latents)]),
            arguments=[str(self.latents)],
            options=resources.further,
            log="finalize-%j.log",
            done=self._has_latents,
        )

    @property
    def _has_latents(self) -> bool:
        return (self.latents / MANIFEST_NAME).is_file()


def evaluation_step(run_directory: Path, resources: Resources) -> Step:
    words = ["ecar-dist", "evaluate", str(run_directory)]
    gpu: Options = {"gpus": "1"} if resources.gpus_per_node else {}
    return Step(
        "evaluate",
        "command.sbatch",
        shlex.join(words),
        arguments=words,
        options={**gpu, **resources.further},
        log="evaluate-%j.log",
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
    """The pipeline that creates the data of `config`.

    Raises ConfigError if an argument contradicts the config, DataError if the source does not exist.
    """
    # Check what can be checked before a job runs.
    if not 0.0 < holdout < 1.0:
        raise ConfigError(f"--holdout {holdout:g} is outside (0, 1); give the fraction of images to score against")
    if config.data.latents is None or is_remote(config.data.latents):
        raise ConfigError(
            f"--pipeline writes to a local folder, but data.latents is {config.data.latents}; set it to a folder, and "
            "copy that to a bucket with `ecar-data push` later"
        )
    is_folder = source not in BUILT_IN and not is_remote(source) and not _GLOB_CHARACTERS & set(source)
    if is_folder and not local_path(source).exists():
        raise DataError(f"--pipeline {source} does not exist; give a folder of class directories, or tars")
    if classes is not None and not classes.is_file():
        raise DataError(f"--classes {classes} is not a file; give a text file with one class name per line")

    return Pipeline(
        source=source,
        shards=_shards_folder(config, shards),
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
    """The config with the images that the pipeline creates, so that `evaluate` finds them."""
    return config.model_copy(update={"data": config.data.model_copy(update=pipeline.images)})


def _shards_folder(config: RunConfig, given: Path | None) -> Path:
    """The output folder of `ecar-data shard`. Raises ConfigError if the config expects the images elsewhere."""
    configured = {"train": config.data.train_images, "heldout": config.data.heldout_images}
    if given is None and configured["train"] is None:
        raise ConfigError("--pipeline needs a folder for image shards; give --shards DIR, or set data.train_images")
    folder = given or local_path(str(configured["train"])).parent

    for part, images in configured.items():
        created = folder / part
        if images is not None and (is_remote(images) or local_path(images).absolute() != created.absolute()):
            key = f"data.{part}_images"
            raise ConfigError(f"{key}={images}, but the pipeline creates {created}; set {key}={created}")
    return folder


def _vae(config: RunConfig, given: str | None) -> str:
    """The config's autoencoder as `ecar-data encode --vae` expects it."""
    if CODECS[config.vae.kind].needs_path:
        return given or str(config.vae.path)
    name = f"{config.vae.kind}-f{config.vae.downsample}"
    if given not in (None, name):
        raise ConfigError(f"--vae {given}, but the config has {name}; omit --vae, or change vae.kind")
    return name
