"""Write one latent shard: `NNNNNN.tar`, then `NNNNNN.idx`, then the commit marker `NNNNNN.json`, each atomically.

The bytes depend on the content alone (no time, user or host), so any worker may write a shard again.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecar_dist.data.atomic import atomic_write, write_json
from ecar_dist.data.manifest import LatentEntry
from ecar_dist.data.shard_files import describe_shard
from ecar_dist.data.shard_layout import (
    DESCRIPTION_NAME,
    LABEL_EXTENSION,
    MOMENTS_DTYPE,
    ShardLayout,
    npy_header,
    sample_key,
)
from ecar_dist.data.tar_index import index_tar, write_dali_index


@dataclass(frozen=True)
class ShardContent:
    """Rows first_index .. first_index + N - 1 of the set."""

    first_index: int
    moments: np.ndarray  # fp16 [N, *shape], raw
    labels: np.ndarray  # int64 [N]
    flipped: np.ndarray | None = None  # fp16 [N, *shape], moments of the mirrored images


def write_latent_shard(
    folder: Path, shard_index: int, content: ShardContent, description: dict[str, Any], marker: dict[str, Any]
) -> LatentEntry:
    """`description` joins the layout inside the tar (encoder, plan id); `marker` joins the entry in the marker file."""
    path = folder / f"{shard_index:06d}.tar"
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(len(content.labels)):
            for extension, payload in _parts(content, row):
                _add(tar, f"{sample_key(content.first_index + row)}.{extension}", payload)
        _add(tar, DESCRIPTION_NAME, json.dumps({**_describe(content), **description}, sort_keys=True).encode())
    write_dali_index(path.with_suffix(".idx"), index_tar(path))
    described = describe_shard(path, len(content.labels), content.first_index)
    entry = LatentEntry(**dataclasses.asdict(described), first_row=content.first_index)
    write_json(path.with_suffix(".json"), {**marker, "entry": dataclasses.asdict(entry)})
    return entry


def _parts(content: ShardContent, row: int) -> list[tuple[str, bytes]]:
    """Extension and payload of each member of one sample, in the layout's order."""
    header = npy_header(content.moments.shape[1:])
    parts = [("latent.npy", header + _array_bytes(content.moments[row]))]
    if content.flipped is not None:
        parts.append(("latent_flip.npy", header + _array_bytes(content.flipped[row])))
    return [*parts, (LABEL_EXTENSION, str(int(content.labels[row])).encode())]


def _array_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=MOMENTS_DTYPE).tobytes()


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(payload), 0o444, 0
    tar.addfile(header, io.BytesIO(payload))


def _describe(content: ShardContent) -> dict[str, Any]:
    """Layout, key range and the CRC-32 of each sample's members laid end to end."""
    count, shape = len(content.labels), content.moments.shape[1:]
    sums = [zlib.crc32(b"".join(payload for _, payload in _parts(content, row))) for row in range(count)]
    return {
        "schema": "ecar-latents-v1",
        "layout": ShardLayout.of(count, shape, content.flipped is not None).to_dict(),
        "first_key": sample_key(content.first_index),
        "last_key": sample_key(content.first_index + count - 1),
        "crc32": base64.b64encode(np.array(sums, dtype="<u4").tobytes()).decode(),
    }
