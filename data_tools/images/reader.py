"""Labelled images to copy, from any source of `ecar-data shard`, and the sources that are built in.

A source is a folder or URL that `ecar-data index` takes, a folder that it or `shard` has made, or a name in
BUILT_IN_SOURCES. To add a source, write a function without arguments that returns an ImageReader, as `read_digits`
does, and list it in BUILT_IN_SOURCES under the name that users type.
"""

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


@dataclass(frozen=True)
class ImageReader:
    """A fixed sequence of labelled images."""

    name: str  # of the source, for the manifest
    class_names: list[str]  # class_names[label]
    labels: np.ndarray  # int64 [count]
    read_many: Callable[[Sequence[int]], list[ImageRecord]]  # indices in [0, count) -> encoded images, in that order
    identity: str = ""  # changes if the images or their order change; empty: the name is enough

    # What only some sources have.
    captions: Sequence[str] = ()  # one for each image, empty where there is none
    groups: np.ndarray | None = None  # int64 [count]; images with the same number are variants of one picture
    heldout: np.ndarray | None = None  # bool [count]: the source's own split, instead of a random one
    attribution: str | None = None  # of the pictures, if their licence requires one


def read_digits() -> ImageReader:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, as grey PNGs. Values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = np.round(loaded.images * (255.0 / 16.0)).astype(np.uint8)  # [N, 8, 8]
    labels = loaded.target.astype(np.int64)

    def read(index: int) -> ImageRecord:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, "PNG")
        return ImageRecord(f"{index:012d}", "digits", int(labels[index]), buffer.getvalue())

    names = [str(name) for name in loaded.target_names]
    return ImageReader("digits", names, labels, lambda indices: [read(int(index)) for index in indices])


def _read_emoji() -> ImageReader:
    from data_tools.images.emoji import read_emoji

    return read_emoji()


def _read_plain_emoji() -> ImageReader:
    from data_tools.images.emoji import read_emoji

    return read_emoji("emoji-plain", skin_tones=False)


def _read_photos() -> ImageReader:
    from data_tools.images.photos import read_photos

    return read_photos()


BUILT_IN_SOURCES: dict[str, Callable[[], ImageReader]] = {
    "digits": read_digits,
    "emoji": _read_emoji,
    "emoji-plain": _read_plain_emoji,
    "photos": _read_photos,
}


@contextlib.contextmanager
def open_images(source: str, rule: LabelRule, *, flat: bool = False) -> Iterator[ImageReader]:
    """Open any source. `rule` and `flat` tell where the labels of a folder or of tars are.

    Raises ConfigError if they are given for a source that already has labels, otherwise the errors of `write_index` and
    `ImageShards`.
    """
    built_in = BUILT_IN_SOURCES.get(source)
    labelled = built_in is not None or (not names_tars(source) and _has_manifest(source))
    if labelled and (flat or rule != LabelRule("cls")):
        raise ConfigError(f"{redact(source)} already has labels; leave out --label, --classes and --flat")

    # A source that is not indexed yet gets an index in a temporary folder.
    if built_in is not None:
        yield built_in()
    elif labelled:
        with _open_indexed(source, source) as reader:
            yield reader
    else:
        with tempfile.TemporaryDirectory(prefix="ecar-index-") as folder:
            write_index(source, Path(folder), rule, flat=flat)
            with _open_indexed(folder, source) as reader:
                yield reader


def _has_manifest(source: str) -> bool:
    if not remote.is_remote(source):
        return (remote.local_path(source) / MANIFEST_NAME).exists()
    try:
        remote.stat(remote.join(source, MANIFEST_NAME))
    except ObjectMissing:
        return False
    return True


@contextlib.contextmanager
def _open_indexed(folder: str, source: str) -> Iterator[ImageReader]:
    with contextlib.closing(ImageShards(folder)) as images:
        about = images.manifest
        yield ImageReader(redact(source), about.class_names, images.labels(), images.read_many, about.dataset_id)
