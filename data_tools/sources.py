"""Where images come from: a folder with one directory per class, or the digits that ship with scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ecar_dist.data.image_shards import IMAGE_EXTENSIONS
from ecar_dist.data.images import PilDecoder
from ecar_dist.errors import DataError

DIGITS = "digits"


@dataclass(frozen=True)
class Source:
    """A stable enumeration of labelled images; `read(i)` gives the extension and the encoded bytes of image i."""

    name: str
    class_names: list[str]
    labels: np.ndarray  # int64 [count]
    read: Callable[[int], tuple[str, bytes]]


def open_source(text: str) -> Source:
    """`digits`, or the path of an image folder. Raises DataError where there is neither."""
    return _digits() if text == DIGITS else _folder(Path(text))


def _digits() -> Source:
    """1,797 handwritten 8x8 digits; values 0..16 become 0..255, kept lossless as grey PNG."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = np.round(loaded.images * (255.0 / 16.0)).astype(np.uint8)  # [N, 8, 8]

    def read(index: int) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, "PNG")
        return "png", buffer.getvalue()

    return Source(DIGITS, [str(name) for name in loaded.target_names], loaded.target.astype(np.int64), read)


def _folder(root: Path) -> Source:
    """Classes are the sorted names of the directories; inside each, images in the order of their sorted names."""
    if not root.is_dir():
        raise DataError(f"image source {root} is no folder; give one with a directory per class, or `{DIGITS}`")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = sorted(path for path in folder.iterdir() if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
        if not found:
            raise DataError(f"class folder {folder} has no image ({', '.join(IMAGE_EXTENSIONS)}); fill or remove it")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{root} has no class folders; put the images of each class into a directory of its own")
    decoder = PilDecoder()

    def read(index: int) -> tuple[str, bytes]:
        data = files[index].read_bytes()
        decoder.decode([data], [str(files[index])])
        extension = files[index].suffix.lower()[1:]
        return ("jpg" if extension == "jpeg" else extension), data

    return Source(str(root), [folder.name for folder in classes], np.array(labels, dtype=np.int64), read)
