"""Random access to labelled encoded images in WebDataset shards."""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass
from pathlib import Path

from ecar_dist.data.manifest import load_image_manifest
from ecar_dist.data.shard_files import check_presence, local_folder, map_verified
from ecar_dist.data.tar_index import TarMember, index_tar, split_name
from ecar_dist.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class ImageRecord:
    key: str
    shard: str  # file name
    label: int
    data: bytes  # as encoded by its maker

    @property
    def where(self) -> str:
        return f"{self.key} in {self.shard}"


@dataclass(frozen=True)
class _OpenShard:
    mapped: mmap.mmap
    samples: list[tuple[str, TarMember, TarMember]]  # key, image, label


class ImageShards:
    """Sample i of a folder of image shards, i in [0, count). Sizes are checked at once, content on first use.

    Raises DataError naming the shard for whatever is missing, damaged or out of range.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_folder(folder)
        self.manifest = load_image_manifest(folder)
        self._firsts = [entry.first_index for entry in self.manifest.shards]
        self._open: dict[int, _OpenShard] = {}
        check_presence(self.folder, self.manifest.shards)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, sample_index: int) -> ImageRecord:
        owner = bisect.bisect_right(self._firsts, sample_index) - 1
        shard, name = self._shard(owner), self.manifest.shards[owner].name
        key, image, label = shard.samples[sample_index - self._firsts[owner]]
        text = shard.mapped[label.offset : label.offset + label.size]
        if not text.isdigit() or int(text) >= self.manifest.num_classes:
            classes = self.manifest.num_classes
            raise DataError(f"{name}: label {text!r} of {key} is not in 0..{classes - 1}; write the image shards again")
        return ImageRecord(key, name, int(text), shard.mapped[image.offset : image.offset + image.size])

    def _shard(self, owner: int) -> _OpenShard:
        if owner not in self._open:
            entry = self.manifest.shards[owner]
            path = self.folder / entry.name
            shard = _OpenShard(map_verified(path, entry), _samples(path))
            if len(shard.samples) != entry.count:
                raise DataError(
                    f"{path} holds {len(shard.samples)} samples, the manifest says {entry.count}; write it again"
                )
            self._open[owner] = shard
        return self._open[owner]


def _samples(path: Path) -> list[tuple[str, TarMember, TarMember]]:
    """Members grouped by key: each sample has one image and one `.cls`."""
    grouped: dict[str, dict[str, TarMember]] = {}
    for member in index_tar(path):
        key, extension = split_name(member.name)
        grouped.setdefault(key, {})[extension.lower()] = member
    samples = []
    for key, parts in grouped.items():
        images = [parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts]
        if len(images) != 1 or "cls" not in parts:
            raise DataError(
                f"{path}: sample {key} has parts {sorted(parts)}, needs one image and cls; write the shard again"
            )
        samples.append((key, images[0], parts["cls"]))
    return samples
