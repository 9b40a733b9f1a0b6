"""Image shards in which some images are truncated."""

from pathlib import Path
from unittest.mock import patch

from data_tools.images.shard import shard
from tests.data_tools.image_folders import CLASSES, PER_CLASS, write_image_folder

BAD = (2, 11, 13)  # indices in the source: a JPEG and two PNGs


def write_bad_image_shards(root: Path, bad: tuple[int, ...] = BAD) -> Path:
    folder = write_image_folder(root / "folder")
    files = [path for name in CLASSES for path in sorted((folder / name).iterdir())]
    assert len(files) == len(CLASSES) * PER_CLASS
    for index in bad:
        files[index].write_bytes(files[index].read_bytes()[:-300])
    with patch("ecar_dist.data.images.decode.PilDecoder.check", lambda *_: {}):  # as if they had been damaged later
        shard(str(folder), root / "images", samples_per_shard=10)
    return root / "images"
