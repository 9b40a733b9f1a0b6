"""The data of a run: checked against the config before anything is allocated, then opened as one loader."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ecar_dist.config.knobs_data import DataSection
from ecar_dist.config.run import RunConfig
from ecar_dist.data.codebook import codebook_of
from ecar_dist.data.fit import check_fits
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.formats import parse_background
from ecar_dist.data.loader import SampleLoader, Share, Source
from ecar_dist.data.order.stream import OrderMade, SampleStream
from ecar_dist.data.probe import Probe, probe_images, probe_latents
from ecar_dist.data.shards.manifest import ImageManifest, Manifest, load_image_manifest, load_manifest
from ecar_dist.data.shards.proof import check_presence
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import DaliLatentSource, ImageSource, LatentSource
from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.runtime.checkpoint.files import DamagedError
from ecar_dist.runtime.checkpoint.storage import open_storage
from ecar_dist.runtime.placement import allow_many_files
from ecar_dist.runtime.world import World
from ecar_dist.train.objective import Normalise
from ecar_dist.vae.codec import EncoderIdentity, LatentCodec, check_same_encoder, normalise
from ecar_dist.vae.pixels import from_pixels

MAX_LOOKED_UP = 10_000  # shards of each set that a rank looks up before it reads


@dataclass(frozen=True)
class TrainingData:
    """What the manifests describe: one or several sets of latents, or one set of images."""

    places: tuple[str, ...]  # folders or URLs
    manifests: tuple[Manifest, ...] | tuple[ImageManifest, ...]
    encoder: EncoderIdentity | None  # None: images, which the run's own autoencoder encodes

    @property
    def count(self) -> int:
        return sum(manifest.count for manifest in self.manifests)

    @property
    def class_names(self) -> list[str]:
        """The name of each class; the sets of a mixture share their labels, and the first one names them."""
        return list(self.manifests[0].class_names)

    @property
    def dataset_ids(self) -> list[str]:
        return [manifest.dataset_id for manifest in self.manifests]


def check_data(config: RunConfig, part: int = 0, parts: int = 1) -> TrainingData:
    """Read the manifests, and look up one of `parts` equal parts of the local shards of sets that are not large.

    A set is large if it has more than MAX_LOOKED_UP shards. Raises DataError if a set does not fit the config, or one
    of these shards is missing.
    """
    data = config.data

    # One set of images.
    if data.images is not None:
        images = load_image_manifest(data.images)
        check_fits(config, [(data.images, images)])
        return TrainingData((data.images,), (images,), None)

    # Sets of latents, all from the same encoder.
    places = tuple(source.latents for source in data.latent_sources)
    cache = cache_options(data).root
    manifests = tuple(load_manifest(place, cache) for place in places)
    encoders = [EncoderIdentity.from_dict(manifest.encoder) for manifest in manifests]
    for place, encoder in zip(places, encoders, strict=True):
        check_same_encoder(encoders[0], encoder, place)

    # Check that they fit the config, and that this part of their shards exists. `open_loader` checks what a rank reads.
    check_fits(config, list(zip(places, manifests, strict=True)))
    for place, manifest in zip(places, manifests, strict=True):
        if len(manifest.shards) <= MAX_LOOKED_UP:
            check_presence(place, manifest.shards[part::parts])
    return TrainingData(places, manifests, encoders[0])


def read_weights(config: RunConfig, data: TrainingData) -> Mapping[str, torch.Tensor]:
    """Parameters of a new run's model that come from the data, by name: the codebook. Raises DataError if damaged.

    Empty if the run starts from other weights: they contain their own codebook, and predict its codes.
    """
    if not kind_of(config).needs_codebook or config.train.init_from is not None:
        return {}
    manifests = cast(tuple[Manifest, ...], data.manifests)
    found = codebook_of(data.places, manifests, config.model.codebook_size, config.model.patch_size)
    return kind_of(config).from_codebook(*found)


def try_data(data: TrainingData) -> Probe:
    """Read the beginning of each set; the result is the slowest read. Raises DataError if one fails."""
    if data.encoder is None:
        return probe_images(data.places[0])
    latents = zip(data.places, cast(tuple[Manifest, ...], data.manifests), strict=True)
    probes = [probe_latents(place, manifest) for place, manifest in latents]
    return max(probes, key=lambda probe: probe.seconds)


def check_codec(config: RunConfig, data: TrainingData, codec: LatentCodec) -> None:
    """Raises DataError if the config's autoencoder did not make the latents, ConfigError if it does not fit images."""
    if data.encoder is not None:
        check_same_encoder(codec.identity, data.encoder, data.places[0])
    elif codec.identity.latent_channels != config.data.latent_channels:
        channels = codec.identity.latent_channels
        raise ConfigError(
            f"data.latent_channels={config.data.latent_channels}, but {codec.identity.name} has {channels}; "
            f"set data.latent_channels={channels}"
        )


def recorded_order(config: RunConfig) -> OrderMade | None:
    """How the order was made, according to the newest readable checkpoint; None if there is none."""
    with contextlib.closing(open_storage(config)) as storage:
        for name in storage.committed():
            try:
                return OrderMade.recorded(storage.manifest(name).identity["data"])
            except DamagedError:
                continue  # the restore reports it
    return None


def open_stream(config: RunConfig, data: TrainingData, made: OrderMade | None = None) -> SampleStream:
    """The order of the run's samples. `made`: how its first attempt made it, None for a new run.

    Raises ConfigError if the lanes do not fit the shards.
    """
    return SampleStream(
        [manifest.counts for manifest in data.manifests],
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        weights=[source.weight for source in config.data.latent_sources] or [1.0],
        by_step=config.data.mixture_by == "step" and len(data.manifests) > 1,
        lanes=config.data.lanes,
        window_shards=config.data.window_shards,
        made=made,
    )


def open_loader(config: RunConfig, world: World, found: TrainingData, stream: SampleStream, start: int) -> SampleLoader:
    """This rank's samples from position `start` on.

    Raises DataError if a local shard that the rank reads in the next epoch is missing. Only the first MAX_LOOKED_UP
    shards are looked up here. The others are looked up when they are used.
    """
    allow_many_files()
    data = config.data
    own = stream.upcoming(start, start + stream.count, [world.rank], world.size)
    return SampleLoader(
        _open_sources(config, world.device, found, [shards[:MAX_LOOKED_UP] for shards in own]),
        stream,
        Share(config.batch.global_batch_size, config.batch.micro_batch_size, world.rank, world.size, world.node_ranks),
        seed=config.run.seed,
        start=start,
        prefetch=data.prefetch,
        max_bad=data.resolved_max_bad if data.on_bad == "substitute" else 0.0,
        pin_memory=world.device.type == "cuda",
    )


def normaliser(data: TrainingData, codec: LatentCodec | None) -> Normalise:
    """The function that turns a loader's batch into latents: it scales and shifts moments, and encodes images first."""
    if data.encoder is not None:
        return partial(normalise, data.encoder)
    assert codec is not None
    return partial(_encode, codec)


def _encode(codec: LatentCodec, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 [B, S, S, 3] -> latents; the same posterior draw as from stored moments."""
    return normalise(codec.identity, codec.encode(from_pixels(pixels)), noise)


def _open_sources(
    config: RunConfig, device: torch.device, found: TrainingData, checked: Sequence[Sequence[int]]
) -> Sequence[Source]:
    """The sources of a run. `checked`: for each source, the local shards to look up."""
    data = config.data
    cache = cache_options(data)

    # Images, decoded on the GPU if DALI can.
    if data.images is not None:
        kind = "dali" if data.backend == "dali" else "pil"
        mixed = kind == "dali" and device.type == "cuda"
        decoder = open_decoder(kind, "mixed" if mixed else "cpu", data.resize, parse_background(data.background))
        size = data.latent_size * config.vae.downsample
        return [ImageSource(data.images, decoder, size, flip=data.flip_images, cache=cache)]

    # Latents, one source for each set of a mixture.
    # Not pinned for DALI or for a mixture, because what they read from a source is copied once more.
    pinned = device.type == "cuda" and data.backend != "dali" and len(data.latent_sources) == 1
    sets = zip(found.places, cast(tuple[Manifest, ...], found.manifests), checked, strict=True)
    sources = [
        LatentSource(place, cache, pin_memory=pinned, manifest=manifest, checked=shards)
        for place, manifest, shards in sets
    ]
    if data.backend == "dali":
        return [DaliLatentSource(source, config.batch.micro_batch_size, device) for source in sources]
    return sources


def cache_options(data: DataSection) -> CacheOptions:
    cache = data.cache
    budget = None if cache.gib is None else int(cache.gib * 2**30)
    return CacheOptions(Path(cache.dir) if cache.dir else None, budget, cache.threads)


def run_identity(
    config: RunConfig, data: TrainingData, stream: SampleStream, codec: LatentCodec | None
) -> dict[str, dict[str, Any]]:
    """What must not change between attempts: the meaning of the weights, and the order of the data."""
    # "model" is compared on every resume; "data" can be overridden with --new-data-order.
    encoder = data.encoder or (codec.identity if codec else None)
    return {
        "model": {
            **config.model_identity,
            "data.resize": config.data.resize,
            "encoder.weights_sha256": encoder and encoder.weights_sha256,
        },
        "data": {
            "run.seed": config.run.seed,
            "dataset_ids": data.dataset_ids,
            **{f"data_order.{name}": value for name, value in stream.describe().items()},
            "data.flip_images": config.data.flip_images,
            **_background_of_images(config),
        },
    }


def _background_of_images(config: RunConfig) -> dict[str, str]:
    """The colour behind transparent images, unless it is white: the identity of older checkpoints lacks the key."""
    data = config.data
    return {"data.background": data.background} if data.images is not None and data.background != "white" else {}


def identity_facts(identity: Mapping[str, Mapping[str, Any]], encoder: EncoderIdentity | None) -> dict[str, str]:
    """What must be the same on all ranks: the run's identity, and the autoencoder's without its name (a path)."""
    # As text, so that any two values can be compared and printed.
    facts = {key: value for part in identity.values() for key, value in part.items()}
    if encoder is not None:
        facts |= {f"encoder.{name}": value for name, value in encoder.to_dict().items() if name != "name"}
    return {key: json.dumps(value) for key, value in facts.items()}
