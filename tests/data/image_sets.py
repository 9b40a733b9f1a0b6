"""Small encoded images and tars of them, made by the writers that people use."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from ecar_dist.data.images.table import ImageRow, write_table
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.data.shards.manifest import ImageManifest, Manifest

NUM_CLASSES = 10


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed % 3, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def samples(count: int, first: int = 0) -> list[tuple[str, bytes, int]]:
    """Key, image and label of `count` samples."""
    return [(f"{index:06d}", encoded(index), index % NUM_CLASSES) for index in range(first, first + count)]


def members_of(content: list[tuple[str, bytes, int]]) -> list[tuple[str, bytes]]:
    """Two members per sample: the image, then its label."""
    return [member for key, data, label in content for member in ((f"{key}.jpg", data), (f"{key}.cls", b"%d" % label))]


def write_tar(
    path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT, mtime: float = 0
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), mtime
            tar.addfile(header, io.BytesIO(data))
    return path


def write_webdataset_tar(path: Path, content: list[tuple[str, bytes, int]]) -> Path:
    """As users write them: with the time of writing, which puts a PAX header before every member."""
    with webdataset.TarWriter(str(path)) as writer:
        for key, data, label in content:
            writer.write({"__key__": key, "jpg": data, "cls": label})
    return path


def what_webdataset_sees(path: Path) -> int:
    """The number of samples that plain webdataset finds in a tar; it may raise."""
    return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False))


def write_unchecked(folder: Path, manifest: Manifest | ImageManifest) -> None:
    """A manifest as a third party would write it, with a matching id; `write_manifest` refuses such names."""
    tree = {"schema": manifest.SCHEMA, **dataclasses.asdict(manifest), "dataset_id": manifest.dataset_id}
    (folder / "manifest.json").write_text(json.dumps(tree))


def write_class_directory(folder: Path, *, key: str = "a.jpg", location: str | None = None, **changes: object) -> Path:
    """An index of one class directory with one image, `class/a.jpg`; `changes` replace fields of its entry."""
    (folder / "class").mkdir(parents=True)
    data = encoded(0)
    (folder / "class/a.jpg").write_bytes(data)
    digest = write_table(folder / "000000.npy", [ImageRow(key, 0, 0, len(data), 0)])
    entry = ImageEntry("class", len(data), 1, 0, "", "", "000000.npy", digest, "files")
    entry = dataclasses.replace(entry, **changes)
    write_unchecked(folder, ImageManifest("s", 1, 1, ["c"], [entry], location))
    return folder
