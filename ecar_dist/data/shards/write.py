"""Write one latent shard: `NNNNNN.tar`, then `NNNNNN.idx`, then the commit marker `NNNNNN.json`.

The bytes of the tar depend only on its content (no time, user or host), and those of index and marker only on the tar.
So any worker can write a shard, and if it dies between two files, another one can complete the shard from the tar.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ecar_dist.data.shards.entries import LatentEntry
from ecar_dist.data.shards.layout import (
    DESCRIPTION_NAME,
    LABEL_EXTENSION,
    MOMENTS_DTYPE,
    ShardLayout,
    npy_header,
    sample_key,
)
from ecar_dist.data.shards.proof import describe_shard
from ecar_dist.data.shards.read import parse_description
from ecar_dist.data.shards.tar_index import BLOCK, TarMember, index_tar, write_dali_index
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import claim_name, naming, temporary_beside, write_json


@dataclass(frozen=True)
class ShardContent:
    """N samples: the rows first_row .. first_row + N + len(missing) - 1 of the plan, except those in `missing`."""

    first_row: int
    moments: np.ndarray  # fp16 [N, *shape], raw
    labels: np.ndarray  # int64 [N]
    flipped: np.ndarray | None = None  # fp16 [N, *shape], raw, of the mirrored images
    missing: tuple[int, ...] = ()  # rows without a sample, ascending

    def keys(self) -> list[str]:
        rows = range(self.first_row, self.first_row + len(self.labels) + len(self.missing))
        missing = frozenset(self.missing)
        return [sample_key(row) for row in rows if row not in missing]


def write_latent_shard(
    folder: Path, shard_index: int, content: ShardContent, description: dict[str, Any]
) -> LatentEntry | None:
    """Write tar, index and marker. Returns None, and writes nothing, if another worker's tar already has the name.

    `description` is stored in the tar together with the layout. The marker repeats it without the encoder.
    """
    # Write under a temporary name, then link it to the final name: the tar is complete or absent.
    path = folder / f"{shard_index:06d}.tar"
    temporary = temporary_beside(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            _write_tar(file, content, description)
            file.flush()
            os.fsync(file.fileno())
        won = claim_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return seal(path) if won else None


def seal(path: Path) -> LatentEntry:
    """Write the index and then the marker of a tar. Raises DataError if the tar is not complete."""
    members = index_tar(path)
    entry, described = describe_latent_shard(path, members)
    write_dali_index(path.with_suffix(".idx"), members)
    write_json(path.with_suffix(".json"), marker_of(described, entry))
    return entry


def describe_latent_shard(path: Path, members: Sequence[TarMember]) -> tuple[LatentEntry, dict[str, Any]]:
    """The entry and the `.ecar.json` of a tar. The entry's `first_index` assumes that no sample of the set is missing.

    Raises DataError if the last member is not a complete `.ecar.json`.
    """
    try:
        with open(path, "rb") as file:
            file.seek(members[-1].offset - BLOCK)
            described = parse_description(file.read())
        first_row = described["first_row"]
        missing = tuple(described["missing"])
        count = described["layout"]["count"]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} does not end with a complete {DESCRIPTION_NAME} ({reason}); write it again") from None
    shard = describe_shard(path, count, first_row)
    return LatentEntry(**dataclasses.asdict(shard), first_row=first_row, missing=missing), described


def marker_of(described: dict[str, Any], entry: LatentEntry) -> dict[str, Any]:
    """The content of the marker `NNNNNN.json`: the entry, and the description without what is in the tar itself."""
    # These fields describe the tar itself, and a reader finds them there.
    of_the_tar = ("schema", "layout", "first_row", "missing", "first_key", "last_key", "crc32", "encoder")
    rest = {name: value for name, value in described.items() if name not in of_the_tar}
    return {**rest, "entry": {**dataclasses.asdict(entry), "missing": list(entry.missing)}}


def _write_tar(file: BinaryIO, content: ShardContent, description: dict[str, Any]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, key in enumerate(content.keys()):
            for extension, payload in _parts(content, row):
                _add(tar, f"{key}.{extension}", payload)
        _add(tar, DESCRIPTION_NAME, json.dumps({**_describe(content), **description}, sort_keys=True).encode())


def _parts(content: ShardContent, row: int) -> list[tuple[str, bytes]]:
    """Extension and payload of each member of one sample, in the order of the layout."""
    # The order and the sizes must be those of ShardLayout.of.
    header = npy_header(content.moments.shape[1:])
    parts = [("latent.npy", header + _array_bytes(content.moments[row]))]
    if content.flipped is not None:
        parts.append(("latent_flip.npy", header + _array_bytes(content.flipped[row])))
    return [*parts, (LABEL_EXTENSION, str(int(content.labels[row])).encode())]


def _array_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=MOMENTS_DTYPE).tobytes()


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    # No time, user or host: equal content gives equal bytes.
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    header.mode = 0o444
    header.mtime = 0
    tar.addfile(header, io.BytesIO(payload))


def _describe(content: ShardContent) -> dict[str, Any]:
    """Layout, keys, and a CRC-32 for each sample over the payloads of its members."""
    keys = content.keys()
    shape = content.moments.shape[1:]
    sums = [zlib.crc32(b"".join(payload for _, payload in _parts(content, row))) for row in range(len(keys))]
    return {
        "schema": "ecar-latents-v1",
        "layout": ShardLayout.of(len(keys), shape, content.flipped is not None).to_dict(),
        "first_row": content.first_row,
        "missing": list(content.missing),
        "first_key": keys[0],
        "last_key": keys[-1],
        "crc32": base64.b64encode(np.array(sums, dtype="<u4").tobytes()).decode(),
    }
