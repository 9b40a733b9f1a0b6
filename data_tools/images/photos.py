"""`photos`: crops of the photographs that ship inside packages, one class for each photograph.

Two come with scikit-learn, which is always installed, one with matplotlib, fourteen with scikit-image (the extra
`photos`). The packages are only looked up, not imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.images.reader import ImageReader
from ecar_dist.data.images.shards import ImageRecord

SIDE = 64  # pixels of a crop
TRAIN_CROPS, HELDOUT_CROPS = 512, 128  # of each photograph
TRAIN_SHARE, HELDOUT_SHARE = 0.7, 0.25  # of the width of a photograph, from the left and from the right
GAP = 32  # minimum pixels between the crops of the two parts
ATTRIBUTION = (
    "photographs of scikit-learn (by danielbuechele and vultilion, CC-BY 2.0), scikit-image and matplotlib; see the "
    "packages for their licences"
)

# package -> folder in it, and files
PHOTOGRAPHS = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
    "skimage": (
        "data",
        (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
}


def read_photos() -> ImageReader:
    """Crops of 64 x 64 pixels as PNGs: 512 to train on from the left of each photograph, 128 held out from its right.

    Their positions are random, but the same in every call. The two parts of a photograph are at least 32 pixels apart.
    """
    # One class per photograph, each with the same number of crops.
    files = find_photographs()
    photographs = [np.asarray(Image.open(file).convert("RGB")) for file in files]  # each [H, W, 3]
    each = TRAIN_CROPS + HELDOUT_CROPS
    corners = [crop_corners(len(pixels), len(pixels[0]), seed) for seed, pixels in enumerate(photographs)]

    def read(index: int) -> ImageRecord:
        label, place = divmod(index, each)
        top, left = corners[label][place]
        buffer = io.BytesIO()
        Image.fromarray(photographs[label][top : top + SIDE, left : left + SIDE]).save(buffer, "PNG")
        name = f"{files[label].name}@{left},{top}"
        return ImageRecord(f"{index:012d}", "photos", label, buffer.getvalue(), lambda: name)

    # Another version of a package may have different photographs, so their bytes are part of the identity.
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return ImageReader(
        "photos",
        [file.stem for file in files],
        np.repeat(np.arange(len(files), dtype=np.int64), each),
        lambda indices: [read(int(index)) for index in indices],
        identity=f"photos {digest}",
        heldout=np.tile(np.arange(each) >= TRAIN_CROPS, len(files)),
        attribution=ATTRIBUTION,
    )


def find_photographs() -> list[Path]:
    """The photographs of the packages that are installed."""
    found: list[Path] = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        homes = (spec.submodule_search_locations or []) if spec else []
        found += [path for home in homes for name in names if (path := Path(home) / folder / name).exists()]
    return found


def crop_corners(height: int, width: int, seed: int) -> np.ndarray:
    """(top, left) of the crops of one photograph, int64 [512 + 128, 2]; those that are held out come last."""
    generator = np.random.default_rng(seed)
    train_end = int(TRAIN_SHARE * width)
    heldout_start = max(width - int(HELDOUT_SHARE * width), train_end + GAP)
    top = generator.integers(0, height - SIDE + 1, TRAIN_CROPS + HELDOUT_CROPS)
    left_train = generator.integers(0, train_end - SIDE + 1, TRAIN_CROPS)
    left_heldout = generator.integers(heldout_start, width - SIDE + 1, HELDOUT_CROPS)
    return np.stack([top, np.concatenate([left_train, left_heldout])], axis=1)
