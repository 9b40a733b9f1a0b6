"""The commit marker of one shard, `NNNNNN.json`: what its tar says of itself, for those who do not open the tar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from data_tools.moments_statistics import check_sums
from ecar_dist.data.shards.manifest import LatentEntry
from ecar_dist.data.shards.manifest_rules import Count
from ecar_dist.data.shards.write import marker_of
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, parse_json, read_plain_file


@dataclass(frozen=True)
class Failure:
    """One image of the plan without a sample."""

    row: Count  # of the plan
    key: str  # in the source
    shard: str  # of the source
    stage: str  # "decode" or "encode"
    error: str
    name: str = ""  # what the file was called in its source; empty in markers of earlier versions


@dataclass(frozen=True)
class Marker:
    plan_id: str
    entry: LatentEntry
    statistics: Annotated[dict[str, Any], AfterValidator(check_sums)]
    failures: tuple[Failure, ...]


def read_marker(out: Path, shard_index: int) -> Marker | None:
    """A marker that is not whole proves nothing, so it counts as none."""
    try:
        tree = parse_json(read_plain_file(out / f"{shard_index:06d}.json", MAX_JSON_BYTES))
        return _MARKER.validate_python(tree)
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None


def marker_from(described: dict[str, Any], entry: LatentEntry) -> Marker:
    """What the marker of a tar with this description must be. Raises ValueError where the description has gaps."""
    return _MARKER.validate_python(marker_of(described, entry))


_MARKER = TypeAdapter(Marker)
