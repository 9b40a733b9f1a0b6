"""Compare data sets with a config through their manifests: for `check`, `submit` and each start of a run.

Does not import torch, so that commands on a login node respond immediately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecar_dist.config.run import RunConfig
from ecar_dist.data.shards.manifest import MANIFEST_NAME, ImageManifest, Manifest, load_image_manifest, load_manifest
from ecar_dist.errors import DataError
from ecar_dist.kinds.table import KINDS
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, local_path

Found = tuple[str, Manifest | ImageManifest]  # folder or URL of a data set, and its manifest


def local_sets(config: RunConfig, *, absent_ok: bool = False) -> list[Found]:
    """The data sets of the run that are in local folders. With `absent_ok`, folders without a manifest are left out.

    Raises DataError for a manifest that is missing or damaged.
    """
    absent = absent_sets(config) if absent_ok else []
    load = load_manifest if config.data.images is None else load_image_manifest
    return [(folder, load(folder)) for folder in _local_folders(config) if folder not in absent]


def absent_sets(config: RunConfig) -> list[str]:
    """Local folders of the run's data without a manifest: not made yet, or not finished."""
    return [folder for folder in _local_folders(config) if not (local_path(folder) / MANIFEST_NAME).exists()]


def _local_folders(config: RunConfig) -> list[str]:
    images = config.data.images
    sets = [source.latents for source in config.data.latent_sources] if images is None else [images]
    return [folder for folder in sets if not is_remote(folder)]


def check_fits(config: RunConfig, sets: Sequence[Found]) -> None:
    """Raises DataError that lists every value in which the config and the data sets differ, with the value to set."""
    problems = [problem for folder, manifest in sets for problem in _problems(config, folder, manifest)]
    # The weights of another run include the codebook whose codes they predict.
    if KINDS[config.model.kind].needs_codebook and sets and config.train.init_from is None:
        problems += _codebook_problems(config, *sets[0])
    if problems:
        raise DataError("; ".join(problems))


def _problems(config: RunConfig, folder: str, manifest: Manifest | ImageManifest) -> list[str]:
    """One message for each kind of difference between the config and one data set."""
    # The values in the manifest, by config key. The weights of the autoencoder are compared when it is loaded.
    shown = redact(folder)
    problems = []
    found: dict[str, Any] = {"data.num_classes": manifest.num_classes}
    if isinstance(manifest, Manifest):
        height, width = manifest.moments_shape[-2:]
        if height == width:
            found["data.latent_size"] = height
        else:
            problems.append(f"{shown} has latents of {height} x {width}, the models need squares; remove this data set")
        keys = {"latent_channels": "data.latent_channels", "kind": "vae.kind", "downsample": "vae.downsample"}
        found |= {key: manifest.encoder[name] for name, key in keys.items() if name in manifest.encoder}

    # All different values in one message, with overrides to copy.
    configured = {key: _configured(config, key) for key in found}
    differing = [key for key in found if configured[key] != found[key]]
    if differing:
        given = " and ".join(f"{key}={configured[key]}" for key in differing)
        theirs = " and ".join(str(found[key]) for key in differing)
        fix = " ".join(f"{key}={found[key]}" for key in differing)
        problems.append(f"{given}, but the samples in {shown} have {theirs}; set {fix}")
    return problems


def _codebook_problems(config: RunConfig, folder: str, manifest: Manifest | ImageManifest) -> list[str]:
    """A message if the set lacks the codebook that the model needs. The first set of a mixture provides it for all."""
    size, patch_size = config.model.codebook_size, config.model.patch_size
    listed = manifest.codebooks if isinstance(manifest, Manifest) else []
    if any((entry.size, entry.patch_size) == (size, patch_size) for entry in listed):
        return []
    has = ", ".join(f"{entry.size} codes for tokens of {entry.patch_size} x {entry.patch_size}" for entry in listed)
    shown = redact(folder)
    return [
        f"model.kind={config.model.kind} needs a codebook of {size} codes for tokens of {patch_size} x {patch_size}, "
        f"{shown} has {has or 'none'}; make it with `ecar-data fit-codebook {shown} --size {size} --patch-size "
        f"{patch_size}`" + (", or set model.codebook_size or model.patch_size to those" if has else "")
    ]


def _configured(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
