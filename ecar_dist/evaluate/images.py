"""Real images for scoring: at the size of the samples, and reconstructed by the autoencoder."""

from __future__ import annotations

import numpy as np
import torch

from ecar_dist.config.knobs_data import DataSection
from ecar_dist.data.images.decode import WHITE, Background, open_decoder
from ecar_dist.data.images.formats import parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.prepared import BUILT_IN
from ecar_dist.data.shards.manifest import ImageManifest, load_manifest
from ecar_dist.errors import DataError
from ecar_dist.evaluate.score import LabelledImages
from ecar_dist.rng import Purpose, normal
from ecar_dist.vae.codec import LatentCodec, normalise
from ecar_dist.vae.pixels import from_pixels, to_pixels

ID_DIGITS = 8


def read_images(
    folder: str, image_size: int, decoder: str = "dali", background: Background = WHITE
) -> tuple[LabelledImages, str]:
    """All images of a folder of image shards at image_size, and a short name of the set. Raises DataError.

    background: behind transparent pixels; it must be that of the training images.
    """
    shards = ImageShards(folder)
    records = [shards.read(index) for index in range(len(shards))]
    converter = open_decoder(decoder, background=background)
    chunks = [records[i : i + 256] for i in range(0, len(records), 256)]
    pixels = [converter.decode_to_batch([r.data for r in c], c, image_size) for c in chunks]
    labels = np.array([record.label for record in records], dtype=np.int64)
    return LabelledImages(np.concatenate(pixels), labels), short_name(shards.manifest)


def short_name(manifest: ImageManifest) -> str:
    """For names of metrics: the same on every machine, wherever the images are stored."""
    return manifest.source if manifest.source in BUILT_IN else manifest.dataset_id[:ID_DIGITS]


def background_of(data: DataSection) -> Background:
    """The background of the images that a run was trained on, from the manifest of its latents if there is one.

    None for latents of an earlier version, which dropped transparency.
    """
    # Latents: their manifest says what was behind transparent pixels when they were encoded.
    if data.images is None:
        try:
            preprocessing = load_manifest(data.latent_sources[0].latents).preprocessing
        except DataError:
            return parse_background(data.background)
        name = preprocessing.get("background")
        return None if name is None else parse_background(str(name))

    # Images: it is in the config.
    return parse_background(data.background)


def reconstruct(codec: LatentCodec, images: LabelledImages, device: torch.device) -> LabelledImages:
    """Encode, sample the posterior, decode: the images after the autoencoder alone."""
    chunks = torch.arange(len(images.pixels)).split(256)
    return LabelledImages(
        np.concatenate([_through(codec, images.pixels, rows, device) for rows in chunks]), images.labels
    )


def _through(codec: LatentCodec, pixels: np.ndarray, rows: torch.Tensor, device: torch.device) -> np.ndarray:
    moments = codec.encode(from_pixels(torch.from_numpy(pixels)[rows].to(device)))
    shape = (codec.identity.latent_channels, *moments.shape[2:])
    noise = normal(0, rows.to(device), Purpose.POSTERIOR, shape)
    return to_pixels(codec.decode(normalise(codec.identity, moments, noise)))
