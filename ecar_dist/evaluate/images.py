"""Real images for scoring, brought to the size of the samples."""

from __future__ import annotations

import numpy as np

from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.images import open_decoder
from ecar_dist.evaluate.score import LabelledImages


def read_images(folder: str, image_size: int, decoder: str = "dali") -> tuple[LabelledImages, str]:
    """All images of a folder of image shards at image_size, and the name of their source. Raises DataError."""
    shards = ImageShards(folder)
    records = [shards.read(index) for index in range(len(shards))]
    converter = open_decoder(decoder)
    chunks = [records[i : i + 256] for i in range(0, len(records), 256)]
    pixels = [converter.decode_to_batch([r.data for r in c], [r.where for r in c], image_size) for c in chunks]
    labels = np.array([record.label for record in records], dtype=np.int64)
    return LabelledImages(np.concatenate(pixels), labels), shards.manifest.source
