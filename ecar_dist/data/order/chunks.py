"""An order in which a large set can be encoded: a pure function of (seed, row) that reads the source in long pieces.

With one permutation of all images (`lanes.sample_indices`), each image is a separate read somewhere in the source.
This order permutes twice:

    chunks   the source is cut into chunks of consecutive images; the chunks are permuted and laid end to end
    shards   the line is cut into shards, and the rows of each shard are permuted

So a shard of n rows is read in n / chunk pieces from anywhere in the source, and needs no other shard.

Example: 10 images, chunks of 2, shards of 4 rows, seed 3:

    line      8 9 0 1 | 2 3 4 5 | 6 7       the order in which they are read
    shards    9 8 0 1 | 5 2 3 4 | 6 7       the order in which they are rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from ecar_dist.data.order.permutation import bits_for, hash_keys, permute, unpermute

# First fields of the keys that permute the chunks of a set, and the rows of a shard.
_CHUNKS = int.from_bytes(b"chunks", "big")
_ROWS = int.from_bytes(b"rows", "big")


@dataclass(frozen=True)
class ChunkOrder:
    """The order described above. It determines the bytes of a set, so a change to it needs a new name."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    chunk: Annotated[int, Field(strict=True, ge=2)]  # images
    name: Literal["chunks-feistel-v1"] = "chunks-feistel-v1"

    def read_order(self, rows: range, shard_index: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a shard in the order in which to read them, and the source image of each; int64 [rows] each.

        count: images in the whole set.
        """
        places = np.arange(len(rows), dtype=np.int64)
        keys = hash_keys(seed, _ROWS, np.full_like(places, shard_index))
        shuffled = rows.start + permute(places, len(rows), keys, bits_for(len(rows)))
        return shuffled, self._line(rows.start + places, count, seed)

    def _line(self, places: np.ndarray, count: int, seed: int) -> np.ndarray:
        """The image at each place of the line; int64 in and out."""
        number = -(-count // self.chunk)
        bits = bits_for(number)
        key = hash_keys(seed, _CHUNKS)

        # The last chunk may be shorter than the others. The places after it in the line move up by what it lacks.
        lacking = number * self.chunk - count
        short_end = (int(unpermute(np.array([number - 1]), number, key, bits)[0]) + 1) * self.chunk - lacking
        places = np.where(places < short_end, places, places + lacking)

        slots, offsets = np.divmod(places, self.chunk)
        return permute(slots, number, np.broadcast_to(key, slots.shape), bits) * self.chunk + offsets
