"""A read at the beginning of a set: whether this node can, and how fast. Shards are proven when they are used."""

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
    where: str  # without secrets
    nbytes: int
    seconds: float


NO_PROBE = Probe("", 0, 0.0)


def probe_latents(place: str, manifest: Manifest) -> Probe:
    """Read the first bytes of the first shard: every rank the same ones, so a bad shard is no node's fault.

    Raises DataError where it cannot be read, or ends too early.
    """
    entry, began = manifest.shards[0], time.perf_counter()
    where, wanted = join(place, entry.name), min(_PROBED_BYTES, entry.bytes)
    found = len(read_range(where, 0, wanted) if is_remote(where) else _read_local(where, wanted))
    if found != wanted:
        raise DataError(f"shard {redact(where)} gave {found} of its first {wanted} bytes; restore it")
    return Probe(redact(where), wanted, time.perf_counter() - began)


def probe_images(place: str) -> Probe:
    """Read the first images of the set, of proven size and, in tars, hash. Raises DataError as `ImageShards`."""
    began, images = time.perf_counter(), ImageShards(place)
    try:
        records = images.read_many(range(min(_PROBED_IMAGES, len(images))))
    finally:
        images.close()
    where = redact(join(images.manifest.home(place), records[0].shard))
    return Probe(where, sum(len(record.data) for record in records), time.perf_counter() - began)


def _read_local(where: str, size: int) -> bytes:
    try:
        with open(where, "rb", buffering=0) as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"cannot read shard {where} ({error.strerror}), the manifest lists it; restore it") from None
