"""Which shards of a plan are done, and how a shard is committed.

A shard is a tar, its DALI index `NNNNNN.idx` and its commit marker `NNNNNN.json`. It is done when the marker exists and
agrees with the description inside the tar. Workers never overwrite each other: the first tar with the final name stays
if it is intact. A worker that dies between writing tar and marker leaves a tar that any other worker checks and
completes. A tar that fails the check is removed and written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from data_tools.encode.plan import EncodePlan
from data_tools.failures import Failure
from data_tools.moments_statistics import check_sums
from ecar_dist.data.shards.entries import LatentEntry
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.read import open_latent_shard, parse_description
from ecar_dist.data.shards.tar_index import index_tar
from ecar_dist.data.shards.write import ShardContent, describe_latent_shard, marker_of, seal, write_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import temporary_beside
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, adapter_of, parse_json, read_plain_file

_LISTING_PAUSE = 20  # times the duration of a listing
_MARKER_NAME = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Marker:
    """Content of a commit marker: a copy of the description in the tar, so that the tar need not be opened."""

    plan_id: str
    entry: LatentEntry
    statistics: Annotated[dict[str, Any], AfterValidator(check_sums)]
    failures: tuple[Failure, ...]


def read_marker(out: Path, shard_index: int) -> Marker | None:
    """None if the marker is missing or damaged: a damaged marker proves nothing."""
    try:
        tree = parse_json(read_plain_file(out / f"{shard_index:06d}.json", MAX_JSON_BYTES))
        return adapter_of(Marker).validate_python(tree)
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None


def marker_from(described: dict[str, Any], entry: LatentEntry) -> Marker:
    """The marker that belongs to a tar with this description. Raises ValueError if the description is incomplete."""
    return adapter_of(Marker).validate_python(marker_of(described, entry))


class CommittedFailures:
    """The number of failures in the finished shards of a folder, including those of other tasks, for FailureTally.

    A listing of a folder with a million files takes seconds, so after one that took t, the next one waits for 20 t.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._by_shard: dict[int, int] = {}  # each marker is read once: it never changes
        self.in_work = -1  # the shard of `begin`; -1: none
        self._next_listing = -math.inf  # time.monotonic()

    def begin(self, shard_index: int) -> None:
        """The shard that this process works on does not count, even if another worker finishes it first."""
        self.in_work = shard_index

    def note(self, shard_index: int, failures: int) -> None:
        """Count the failures of a shard that this process has just committed, without a listing."""
        self._by_shard[shard_index] = failures
        self.in_work = -1

    def __call__(self) -> int:
        began = time.monotonic()
        if began >= self._next_listing:
            for shard_index in marked_shards(self._out):
                if shard_index not in self._by_shard and (marker := read_marker(self._out, shard_index)) is not None:
                    self._by_shard[shard_index] = len(marker.failures)
            ended = time.monotonic()
            self._next_listing = ended + _LISTING_PAUSE * (ended - began)
        return sum(self._by_shard.values()) - self._by_shard.get(self.in_work, 0)


def marked_shards(out: Path) -> Iterator[int]:
    """The numbers of the shards with a marker, in any order."""
    with os.scandir(out) as files:
        for match in (_MARKER_NAME.fullmatch(file.name) for file in files):
            if match:
                yield int(match[1])


def failures_of(out: Path, shards: Iterable[int], in_work: Mapping[int, Sequence[Failure]]) -> Iterator[Failure]:
    """The failures of some shards, from their markers; shards in work have no marker yet."""
    for shard_index in shards:
        marker = read_marker(out, shard_index)
        yield from marker.failures if marker is not None else in_work.get(shard_index, ())


def is_committed(out: Path, shard_index: int, plan: EncodePlan) -> bool:
    """True if `committed_marker` finds one."""
    return committed_marker(out, shard_index, plan) is not None


def committed_marker(out: Path, shard_index: int, plan: EncodePlan) -> Marker | None:
    """The marker, if it belongs to this plan and agrees with the description in the tar; otherwise None.

    Reads the end of the tar, not its samples. `verify` and every loader check those.
    """
    marker = read_marker(out, shard_index)
    path = out / f"{shard_index:06d}.tar"
    if marker is None or marker.plan_id != plan.plan_id or not path.with_suffix(".idx").exists():
        return None
    entry = marker.entry
    try:
        # The description is the last member, at an offset that follows from the number of samples.
        with open(path, "rb") as file:
            file.seek(ShardLayout.of(entry.count, plan.moments_shape, plan.has_flip).end)
            described = parse_description(file.read())
            size = file.tell()

        # Compare with the marker that this description gives. The hashes in the entry are not computed here.
        row = described["first_row"]
        missing = tuple(described["missing"])
        wanted = dataclasses.replace(entry, name=path.name, bytes=size, first_index=row, first_row=row, missing=missing)
        return marker if marker == marker_from(described, wanted) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def commit(out: Path, shard_index: int, plan: EncodePlan, content: ShardContent, about: dict[str, Any]) -> None:
    """Write a shard. If another worker was first and its tar is intact, keep that one."""
    description = {"encoder": plan.encoder, "plan_id": plan.plan_id, **about}
    while write_latent_shard(out, shard_index, content, description) is None:
        if is_committed(out, shard_index, plan) or recover(out, shard_index, plan):
            return


def recover(out: Path, shard_index: int, plan: EncodePlan) -> bool:
    """Complete the tar that a dead worker left.

    Returns False if there is no tar, or if it was damaged and has been removed.
    """
    path = out / f"{shard_index:06d}.tar"
    try:
        # While the file is open, no other file can get its inode number, so _drop removes exactly this one.
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
    """Check plan, rows, description, structure and the CRC-32 of every sample. Raises DataError if one is wrong."""
    entry, described = describe_latent_shard(path, index_tar(path))
    stated = (described.get("plan_id"), entry.first_row, entry.count + len(entry.missing))
    if stated != (plan.plan_id, rows.start, len(rows)):
        raise DataError(f"{path} belongs to another plan or another shard; write it again")
    try:
        marker_from(described, entry)
    except ValueError as error:
        raise DataError(f"{path} has an incomplete description ({error}); write it again") from None
    open_latent_shard(path, entry, plan).check_samples()


def _drop(path: Path, seen: os.stat_result) -> None:
    """Remove the damaged file `seen`, but not a good one that another worker has put there since."""
    aside = temporary_beside(path)
    os.rename(path, aside)
    if not os.path.samestat(os.stat(aside), seen):
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
