"""The reads that an encoding order costs, and how well it mixes: 10^9 images in tars that are sorted by class.

`scale_encode.py [--chunks 16 32 64 256] [--shards 20] [--save FILE]`: one permutation of all images (`--chunk 1`),
chunks of several sizes, and blocks of 64 permuted tars whose images are permuted together. Computed from the orders
themselves for some output shards of one of 64 tasks, with images of 100 kB; no image is read. Mixing is chi-square over
degrees of freedom of the classes, 1 for draws from the whole set: in an output shard, and in a global batch that
training draws from 64 lanes of 4 output shards.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds
import xxhash

from ecar_dist.data.images import shards as image_shards
from ecar_dist.data.images.table import ImageRow, decode_table, encode_table
from ecar_dist.data.order.chunks import ChunkOrder
from ecar_dist.data.order.lanes import LaneOrder, sample_indices
from ecar_dist.data.shards.entries import ImageEntry

COUNT = 10**9
TAR = 10_000  # images
CLASSES = 1000
IMAGE = 100_000  # bytes
SHARD = 4096
TASKS = 64
BLOCK = 64  # tars
LANES = 64
BATCH = 4096
SEED = 1

ReadOrder = Callable[[int], tuple[np.ndarray, np.ndarray]]  # shard -> rows and source images, as they are read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64, 256], help="images in a chunk")
    parser.add_argument("--shards", type=int, default=20, help="output shards to look at (default: 20)")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()

    blocks = LaneOrder([TAR] * (COUNT // TAR), SEED, lanes=1, window_shards=BLOCK)
    orders: dict[str, ReadOrder] = {
        "one permutation": lambda shard: (rows_of(shard), sample_indices(rows_of(shard), COUNT, SEED)),
        f"blocks of {BLOCK} tars": lambda shard: (rows_of(shard), blocks.sample_indices(rows_of(shard))),
    }
    orders |= {f"chunks of {size}": in_chunks(size) for size in options.chunks}
    table, seconds = table_of_a_tar()
    rows = {}
    for name, order in orders.items():
        rows[name] = {**reads(order, options.shards, table, seconds), **mixing(order, options.shards)}
        print(name, rows[name], flush=True)
    rounds.publish({"rows": rows, "hardware": rounds.hardware()}, options.save)


def rows_of(shard: int) -> np.ndarray:
    return np.arange(shard * SHARD, (shard + 1) * SHARD, dtype=np.int64)


def in_chunks(size: int) -> ReadOrder:
    order = ChunkOrder(size)
    return lambda shard: order.read_order(range(shard * SHARD, (shard + 1) * SHARD), shard, COUNT, SEED)


def table_of_a_tar() -> tuple[int, float]:
    """Bytes of the table of a tar, and the CPU seconds to check it."""
    data = encode_table([ImageRow(f"{row:09d}", 0, row * IMAGE, IMAGE, row) for row in range(TAR)])
    entry = ImageEntry("a.tar", TAR * IMAGE, TAR, 0, "", "", "a.npy", xxhash.xxh3_128_hexdigest(data), "tar")
    began = time.process_time()
    for _ in range(20):
        decode_table(data, entry, 1, "a.npy")
    return len(data), (time.process_time() - began) / 20


def reads(order: ReadOrder, shards: int, table: int, seconds: float) -> dict[str, float]:
    """Means over the shards that task 0 makes one after another, with the tables that it keeps."""
    kept: dict[int, None] = {}
    pieces = requests = tables = 0
    touched = []
    for shard in range(0, shards * TASKS, TASKS):
        images = order(shard)[1]
        breaks = np.flatnonzero((np.diff(images) != 1) | (np.diff(images // TAR) != 0))
        lengths = np.diff(np.concatenate([[-1], breaks, [SHARD - 1]]))
        pieces += len(lengths)
        requests += int((-(-lengths // (image_shards._TOGETHER // IMAGE))).sum())

        # The oldest tables are dropped first.
        tars = np.unique(images // TAR).tolist()
        touched.append(len(tars))
        new = [tar for tar in tars if tar not in kept]
        tables += len(new)
        kept |= dict.fromkeys(new)
        while len(kept) * table > image_shards.TABLE_BYTES:
            del kept[next(iter(kept))]
    return {
        "pieces a shard": pieces / shards,
        "requests for images": requests / shards,
        "tars a shard": float(np.mean(touched)),
        "tables read a shard": tables / shards,
        "MB of tables a shard": round(tables / shards * table / 1e6, 1),
        "CPU s for tables a shard": round(tables / shards * seconds, 2),
    }


def mixing(order: ReadOrder, shards: int) -> dict[str, float]:
    """For the same shards: the share of the most frequent tar, and the classes; then the classes of a batch."""
    shares, in_shard = [], []
    for shard in range(0, shards * TASKS, TASKS):
        images = order(shard)[1]
        shares.append(np.unique(images // TAR, return_counts=True)[1].max() / SHARD)
        in_shard.append(excess(images))

    # A training batch: some rows of the shards of as many windows as there are lanes.
    generator = np.random.default_rng(0)
    chosen = generator.choice(COUNT // SHARD, LANES * 4, replace=False)
    pooled = np.concatenate([order(int(shard))[1] for shard in chosen])
    batches = [excess(generator.choice(pooled, BATCH, replace=False)) for _ in range(20)]
    return {
        "largest share of a tar, %": round(100 * float(np.mean(shares)), 2),
        "chi2/dof of a shard": round(float(np.mean(in_shard)), 2),
        "chi2/dof of a batch": round(float(np.mean(batches)), 3),
    }


def excess(images: np.ndarray) -> float:
    """Chi-square over degrees of freedom of the classes, against equal shares."""
    found = np.bincount(images // (COUNT // CLASSES), minlength=CLASSES)
    expected = len(images) / CLASSES
    return float(((found - expected) ** 2 / expected).sum() / (CLASSES - 1))


if __name__ == "__main__":
    main()
