"""A small image folder, and the encoding of it that the tests run again and again."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.encode.run import encode
from data_tools.images.shard import shard

CLASSES = ("bird", "cat", "dog")
PER_CLASS = 8


def write_image_folder(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for place in range(PER_CLASS):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{place}.{'png' if place % 2 else 'jpeg'}")
    return root


def write_image_shards(root: Path) -> Path:
    shard(str(write_image_folder(root / "folder")), root / "images", samples_per_shard=10)
    return root / "images"


def encode_small(images: Path, out: Path, **changes: object) -> None:
    settings = {"vae": "dct-f8", "image_size": 16, "samples_per_shard": 5, "batch_size": 3, "decoder": "pil"}
    encode(images, out, **{**settings, "device": "cpu", **changes})  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
