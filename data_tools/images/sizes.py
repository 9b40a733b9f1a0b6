"""`--image-size` against the images that are there: proposed where it is missing, a warning where most are enlarged."""

from __future__ import annotations

import statistics
import sys

from ecar_dist.data.images.decode import image_sides
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.errors import ConfigError, DataError

_LOOKED_AT = 64  # images, spread over the first shard


def require_image_size(images: ImageShards, image_size: int | None, downsample: int) -> int:
    """`image_size` if there is one. Raises ConfigError with the sizes found and a proposal where it is missing."""
    if image_size is not None:
        return image_size
    sides = _shorter_sides(images)
    if not sides:
        raise ConfigError(
            f"--image-size is missing, and no image of {images.manifest.source} can be read to propose one; give the "
            f"side of the square images in pixels, a multiple of {downsample}"
        )
    proposal, median = downsample, statistics.median_low(sides)
    while proposal * 2 <= median:
        proposal *= 2
    raise ConfigError(
        f"--image-size is missing: the shorter sides of {len(sides)} images of the first shard are {min(sides)} to "
        f"{max(sides)} pixels, half of them at least {median}; give e.g. --image-size {proposal}"
    )


def warn_if_enlarged(images: ImageShards, image_size: int) -> None:
    """Say on stderr that most images are smaller than `image_size`, where they can be read at all."""
    try:
        sides = _shorter_sides(images)
    except DataError:
        return
    smaller = sum(side < image_size for side in sides)
    if smaller * 2 > len(sides):
        print(
            f"ecar-data: warning: {smaller} of {len(sides)} images looked at are smaller than --image-size "
            f"{image_size} (half of them have {statistics.median_low(sides)} pixels or less on the shorter side) and "
            "will be enlarged",
            file=sys.stderr,
        )


def _shorter_sides(images: ImageShards) -> list[int]:
    count = images.manifest.shards[0].count
    records = images.read_many(range(0, count, -(-count // _LOOKED_AT)))
    return [min(sides) for record in records if (sides := image_sides(record.data)) is not None]
