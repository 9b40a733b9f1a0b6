"""Which shards of a plan are done, and how one becomes done: the first tar with the name stays, if it is whole.

A shard is done when its marker is there and is what the tar gives. A worker that died between tar and marker leaves a
tar that any other worker proves and finishes; a tar that cannot be proven is dropped and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from data_tools.encode.markers import marker_from, read_marker
from data_tools.encode.plan import EncodePlan
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.read import open_latent_shard, parse_description
from ecar_dist.data.shards.tar_index import index_tar
from ecar_dist.data.shards.write import ShardContent, describe_latent_shard, seal, write_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import temporary_beside


def is_committed(out: Path, shard_index: int, plan: EncodePlan) -> bool:
    """True if the marker is there, is of this plan, and says what the tar's own description says.

    Reads the end of the tar, not its samples: proving these is the business of `verify`, and of every loader.
    """
    marker, path = read_marker(out, shard_index), out / f"{shard_index:06d}.tar"
    if marker is None or marker.plan_id != plan.plan_id or not path.with_suffix(".idx").exists():
        return False
    entry = marker.entry
    try:
        with open(path, "rb") as file:
            file.seek(ShardLayout.of(entry.count, plan.moments_shape, plan.has_flip).end)
            described, size = parse_description(file.read()), file.tell()
        row, missing = described["first_row"], tuple(described["missing"])
        wanted = dataclasses.replace(entry, name=path.name, bytes=size, first_index=row, first_row=row, missing=missing)
        return marker == marker_from(described, wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def commit(out: Path, shard_index: int, plan: EncodePlan, content: ShardContent, about: dict[str, Any]) -> None:
    """Write a shard; where another worker was first and its tar is whole, keep that one instead."""
    description = {"encoder": plan.encoder, "plan_id": plan.plan_id, **about}
    while write_latent_shard(out, shard_index, content, description) is None:
        if is_committed(out, shard_index, plan) or recover(out, shard_index, plan):
            return


def recover(out: Path, shard_index: int, plan: EncodePlan) -> bool:
    """Finish the tar that a dead worker left. False where there is none, or where it was not whole and is now gone."""
    path = out / f"{shard_index:06d}.tar"
    try:
        # as long as it is open, no other file can get its inode number
        with open(path, "rb") as seen:
            try:
                _prove(path, plan, plan.rows(shard_index))
            except DataError:
                _drop(path, os.fstat(seen.fileno()))
                return False
    except FileNotFoundError:
        return False
    seal(path)
    return True


def _prove(path: Path, plan: EncodePlan, rows: range) -> None:
    """Plan, rows, description, structure and every sample's CRC-32. Raises DataError where one is wrong."""
    entry, described = describe_latent_shard(path, index_tar(path))
    stated = (described.get("plan_id"), entry.first_row, entry.count + len(entry.missing))
    if stated != (plan.plan_id, rows.start, len(rows)):
        raise DataError(f"{path} belongs to another plan, or to another place in it; write it again")
    try:
        marker_from(described, entry)
    except ValueError as error:
        raise DataError(f"{path} has a description with gaps ({error}); write it again") from None
    open_latent_shard(path, entry, plan).check_samples()


def _drop(path: Path, seen: os.stat_result) -> None:
    """Remove the very file that was found bad: another worker may have put a good one in its place meanwhile."""
    aside = temporary_beside(path)
    os.rename(path, aside)
    if not os.path.samestat(os.stat(aside), seen):
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
