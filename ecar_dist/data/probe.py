"""Read the beginning of a data set to find out whether this node can read it, and how fast.

The content is not checked here: shards are proven when they are used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import Manifest
from ecar_dist.errors import DataError
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import is_remote, join, read_range

_PROBED_BYTES = 4 << 20
_PROBED_IMAGES = 16


@dataclass(frozen=True)
class Probe:
    """How long it took to read `nbytes` bytes from `where` (a path, or a URL without secrets)."""

    where: str
    nbytes: int
    seconds: float


NO_PROBE = Probe("", 0, 0.0)


def probe_latents(folder: str, manifest: Manifest) -> Probe:
    """Read the first bytes of the first shard.

    All nodes read the same bytes: if only some of them fail, it is not the shard's fault. Raises DataError if the shard
    cannot be read, or if it ends too early.
    """
    entry = manifest.shards[0]
    where = join(folder, entry.name)
    wanted = min(_PROBED_BYTES, entry.bytes)
    began = time.perf_counter()
    found = len(read_range(where, 0, wanted) if is_remote(where) else _read_local(where, wanted))
    if found != wanted:
        raise DataError(f"shard {redact(where)} gave {found} of its first {wanted} bytes; restore it")
    return Probe(redact(where), wanted, time.perf_counter() - began)


def probe_images(folder: str) -> Probe:
    """Read the first images of the set and check their sizes and, in tars, their hashes. Raises DataError."""
    began = time.perf_counter()
    images = ImageShards(folder)
    try:
        records = images.read_many(range(min(_PROBED_IMAGES, len(images))))
    finally:
        images.close()
    where = redact(join(images.manifest.home(folder), records[0].shard))
    return Probe(where, sum(len(record.data) for record in records), time.perf_counter() - began)


def _read_local(where: str, size: int) -> bytes:
    try:
        with open(where, "rb", buffering=0) as file:
            return file.read(size)
    except OSError as error:
        raise DataError(
            f"cannot read shard {where} ({error.strerror}), but the manifest lists it; restore it"
        ) from None
