"""The folder `.OUT.indexing`, next to OUT: `ecar-data index` collects the tables of tars in it, then renames it to OUT.

It survives a kill or an error, and several tasks share it: each tar has a record once its table is written, and the
task that finds all records writes the manifest. The manifest does not depend on which task indexed which tar, or in
which order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_tools.images.sources import Tars
from data_tools.images.tar_samples import LabelRule
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import claim_name, temporary_beside, write_json
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, adapter_of, parse_json, read_plain_file

_RECORDS = ".tars"  # one file for each tar, and the identity of the command
_IDENTITY = "identity.json"


@dataclass(frozen=True)
class IndexedTar:
    """What the manifest needs to know about one tar. `largest`: its largest label, -1 without images."""

    entry: ImageEntry | None  # None: it has no images
    largest: Annotated[int, Field(ge=-1)]


class IndexFolder:
    """The shared folder of one index. `found`, `rule`: what is indexed; a different command starts over.

    alone: whether this process is the only task. Then it may remove what a different command has left; otherwise that
    raises DataError.
    """

    def __init__(self, out: Path, found: Tars, rule: LabelRule, *, alone: bool) -> None:
        self.path = out.with_name(f".{out.name}.indexing")
        self._out = out
        self._records = self.path / _RECORDS
        self._count = len(found.files)

        # The first task writes the identity, the others compare theirs.
        identity = _identity(found, rule)
        self._records.mkdir(parents=True, exist_ok=True)
        self._claim(identity)
        if self._read(_IDENTITY) != identity:
            if not alone:
                raise DataError(
                    f"{self.path} has an index of other tars or with other options; remove it, or repeat its command"
                )
            shutil.rmtree(self.path)
            self._records.mkdir(parents=True)
            self._claim(identity)

    def _claim(self, identity: dict[str, Any]) -> None:
        temporary = temporary_beside(self._records / _IDENTITY)
        write_json(temporary, identity)
        try:
            claim_name(temporary, self._records / _IDENTITY)
        finally:
            temporary.unlink(missing_ok=True)

    def record(self, place: int) -> IndexedTar | None:
        """The record of a tar; None if it is not done, or its record is damaged."""
        try:
            done = adapter_of(IndexedTar).validate_python(self._read(f"{place:06d}.json"))
        except ValueError:
            return None
        return done if done.entry is None or (self.path / done.entry.table).exists() else None

    def add(self, place: int, done: IndexedTar) -> None:
        write_json(self._records / f"{place:06d}.json", dataclasses.asdict(done))

    def all_done(self) -> list[IndexedTar] | None:
        """The records of all tars in their order; None if some are missing. Raises OSError if the folder is gone."""
        names = set(os.listdir(self._records))
        if any(f"{place:06d}.json" not in names for place in range(self._count)):
            return None
        done = [self.record(place) for place in range(self._count)]
        if None in done:
            os.stat(self._records)  # perhaps another task has just given the folder its final name
            return None
        return [one for one in done if one is not None]

    def number_done(self) -> int:
        """The number of finished tars, by their records; 0 if the folder is gone."""
        with contextlib.suppress(FileNotFoundError):
            return sum(name.endswith(".json") and name != _IDENTITY for name in os.listdir(self._records))
        return 0

    def finish(self) -> None:
        """Give the folder its final name. Another task may do so at the same time, with the same content."""
        os.rename(self.path, self._out)
        shutil.rmtree(self._out / _RECORDS, ignore_errors=True)

    def drop(self) -> None:
        """Remove the folder and its content."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> Any:
        """None if it is missing or damaged: then the work is done again."""
        try:
            return parse_json(read_plain_file(self._records / name, MAX_JSON_BYTES))
        except (OSError, ValueError):
            return None


def _identity(found: Tars, rule: LabelRule) -> dict[str, Any]:
    """What determines the content of an index, without the names of all tars."""
    listed = json.dumps([[file.name, file.size] for file in found.files]).encode("utf-8", "surrogatepass")
    names: Sequence[str] | None = rule.class_names
    return {
        "location": redact(found.location),
        "tars": len(found.files),
        "tars_sha256": hashlib.sha256(listed).hexdigest(),
        "label": f"{rule.kind}:{rule.field}",
        "classes": None if names is None else list(names),
    }
