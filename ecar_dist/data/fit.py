"""Whether data sets are what a config says, by their manifests alone: for `check`, `submit` and each start of a run.

Free of torch, so that a login node answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecar_dist.config.run import RunConfig
from ecar_dist.data.shards.manifest import MANIFEST_NAME, ImageManifest, Manifest, load_image_manifest, load_manifest
from ecar_dist.errors import DataError
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, local_path

Found = tuple[str, Manifest | ImageManifest]  # folder or URL, and what it holds


def local_sets(config: RunConfig, *, absent_ok: bool = False) -> list[Found]:
    """The run's sets in local folders, without those that are not there where that is `absent_ok`.

    Raises DataError where one has no manifest, or a damaged one.
    """
    absent = absent_sets(config) if absent_ok else []
    load = load_manifest if config.data.images is None else load_image_manifest
    return [(place, load(place)) for place in _local_places(config) if place not in absent]


def absent_sets(config: RunConfig) -> list[str]:
    """Local folders of the run's data that hold no manifest: not made yet, or not finished."""
    return [place for place in _local_places(config) if not (local_path(place) / MANIFEST_NAME).exists()]


def _local_places(config: RunConfig) -> list[str]:
    images = config.data.images
    places = [source.latents for source in config.data.latent_sources] if images is None else [images]
    return [place for place in places if not is_remote(place)]


def check_fits(config: RunConfig, sets: Sequence[Found]) -> None:
    """Raises DataError that names every value in which the config and the sets differ, with what to set."""
    problems = [problem for place, manifest in sets for problem in _problems(config, place, manifest)]
    if problems:
        raise DataError("; ".join(problems))


def _problems(config: RunConfig, place: str, manifest: Manifest | ImageManifest) -> list[str]:
    shown, found = redact(place), {"data.num_classes": manifest.num_classes}
    problems = []
    if isinstance(manifest, Manifest):
        height, width = manifest.moments_shape[-2:]
        if height != width:
            problems.append(f"{shown} has latents of {height} x {width}; the models take squares: leave this set out")
        found |= _of_encoder(manifest) | ({"data.latent_size": height} if height == width else {})

    configured = {key: _configured(config, key) for key in found}
    differing = [key for key in found if configured[key] != found[key]]
    if differing:
        given = " and ".join(f"{key}={configured[key]}" for key in differing)
        theirs = " and ".join(str(found[key]) for key in differing)
        fix = " ".join(f"{key}={found[key]}" for key in differing)
        problems.append(f"{given}, but the samples in {shown} have {theirs}; set {fix}")
    return problems


def _of_encoder(manifest: Manifest) -> dict[str, Any]:
    """What a set says of its autoencoder, by key of the config; its weights are compared when they are loaded."""
    keys = {"latent_channels": "data.latent_channels", "kind": "vae.kind", "downsample": "vae.downsample"}
    return {key: manifest.encoder[name] for name, key in keys.items() if name in manifest.encoder}


def _configured(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
