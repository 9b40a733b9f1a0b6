"""Small sets of latent shards that the tests read and damage."""

import dataclasses
from pathlib import Path

import numpy as np

from ecar_dist.data.shards.manifest import Manifest, write_manifest
from ecar_dist.data.shards.write import ShardContent, write_latent_shard

SHAPE = (4, 3, 2)
COUNTS = (40, 40, 17)
NUM_CLASSES = 10


def write_set(folder: Path, *, flip: bool = False, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Write three shards and their manifest. Returns the moments [97, *SHAPE] and labels [97] in them."""
    generator = np.random.default_rng(0)
    total = sum(COUNTS)
    moments = generator.normal(size=(total, *SHAPE)).astype(np.float16)
    if labels is None:
        labels = generator.integers(0, NUM_CLASSES, total)
    entries, first = [], 0
    for index, count in enumerate(COUNTS):
        rows = slice(first, first + count)
        mirrored = moments[rows, ..., ::-1] if flip else None
        content = ShardContent(first, moments[rows], labels[rows], mirrored)
        entries.append(write_latent_shard(folder, index, content, {"encoder": {}, "plan_id": "p"}))
        first += count
    names = [str(label) for label in range(NUM_CLASSES)]
    write_manifest(folder, Manifest(total, NUM_CLASSES, names, SHAPE, flip, {}, {}, {}, entries))
    return moments, labels


def restate(folder: Path, manifest: Manifest, shard_index: int, **changes: object) -> Manifest:
    """Write the manifest again with one shard's entry changed: for a damaged tar with matching hashes."""
    shards = list(manifest.shards)
    shards[shard_index] = dataclasses.replace(shards[shard_index], **changes)
    changed = dataclasses.replace(manifest, shards=shards)
    write_manifest(folder, changed)
    return changed
