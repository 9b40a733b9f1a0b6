"""Labelled images to copy: an indexed or image-shard folder, a source not yet indexed, or scikit-learn's digits."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.images.index import write_index
from data_tools.images.sources import names_tars
from data_tools.images.tar_samples import LabelRule
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.shards.manifest import MANIFEST_NAME
from ecar_dist.errors import ConfigError
from ecar_dist.storage import remote
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import ObjectMissing

DIGITS = "digits"


@dataclass(frozen=True)
class ImageReader:
    """A stable enumeration of labelled images; `read_many` gives any of them in the order asked."""

    name: str
    class_names: list[str]
    labels: np.ndarray  # int64 [count]
    read_many: Callable[[Sequence[int]], list[ImageRecord]]


@contextlib.contextmanager
def open_images(source: str, rule: LabelRule, *, flat: bool = False) -> Iterator[ImageReader]:
    """`digits`, a folder with a manifest of images, or anything that `index` takes. Raises DataError as they do.

    Raises ConfigError for a `rule` of labels where they are settled already.
    """
    settled = source == DIGITS or (not names_tars(source) and _has_manifest(source))
    if settled and (flat or rule != LabelRule("cls")):
        raise ConfigError(f"the labels of {redact(source)} are settled; leave out --label, --classes and --flat")
    if settled:
        if source == DIGITS:
            yield _digits()
            return
        with contextlib.closing(ImageShards(source)) as images:
            yield _indexed(source, images)
    else:
        with tempfile.TemporaryDirectory(prefix="ecar-index-") as folder:
            write_index(source, Path(folder), rule, flat=flat)
            with contextlib.closing(ImageShards(folder)) as images:
                yield _indexed(source, images)


def _has_manifest(source: str) -> bool:
    if remote.is_remote(source):
        try:
            remote.stat(remote.join(source, MANIFEST_NAME))
        except ObjectMissing:
            return False
        return True
    return (remote.local_path(source) / MANIFEST_NAME).exists()


def _indexed(source: str, images: ImageShards) -> ImageReader:
    return ImageReader(redact(source), images.manifest.class_names, images.labels(), images.read_many)


def _digits() -> ImageReader:
    """1,797 handwritten 8x8 digits; values 0..16 become 0..255, kept lossless as grey PNG."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = np.round(loaded.images * (255.0 / 16.0)).astype(np.uint8)  # [N, 8, 8]
    labels = loaded.target.astype(np.int64)

    def read(index: int) -> ImageRecord:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, "PNG")
        return ImageRecord(f"{index:012d}", DIGITS, int(labels[index]), buffer.getvalue())

    names = [str(name) for name in loaded.target_names]
    return ImageReader(DIGITS, names, labels, lambda indices: [read(int(index)) for index in indices])
