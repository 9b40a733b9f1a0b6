"""The folder `.OUT.unfinished`, next to OUT: `ecar-data shard` writes in it, then renames it to OUT.

It survives a kill. A later command with the same source and options continues after the last finished shard; any other
command starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.errors import DataError
from ecar_dist.storage.atomic import write_json
from ecar_dist.storage.node_lock import is_open_as, try_lock
from ecar_dist.storage.untrusted import MAX_JSON_BYTES, adapter_of, parse_json, read_plain_file

_RECORDS = ".shards"  # one file for each finished shard, and the identity of the command
_LOCK = ".lock"


@dataclass(frozen=True)
class FinishedShard:
    """What the command must remember about a shard. `entry` is None if all its images are bad."""

    entry: ImageEntry | None
    failures: list[dict[str, Any]] = field(default_factory=list)
    animated: int = 0


@contextlib.contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """The folder is renamed to `out` at the end, and removed after an error.

    It stays after a kill, and after Ctrl-C if a shard is finished. Raises DataError if `out` exists and is not an empty
    folder, or if another process is writing it.
    """
    _refuse_occupied(out)
    working = out.with_name(f".{out.name}.unfinished")
    working.mkdir(parents=True, exist_ok=True)
    with open(working / _LOCK, "ab") as lock:
        # Another command may have renamed or removed the folder with this lock after it was opened.
        if not try_lock(lock) or not is_open_as(lock, working / _LOCK):
            raise DataError(f"another command is writing {out}; wait for it, or give another folder")
        try:
            _refuse_occupied(out)  # again: another command may have finished in the meantime
            yield working
            shutil.rmtree(working / _RECORDS, ignore_errors=True)
            os.rename(working, out)  # with the lock: without it, another command could write in the folder
            (out / _LOCK).unlink()
        except BaseException as error:
            # What an interrupted command has finished is worth keeping.
            if isinstance(error, Exception) or not any((working / _RECORDS).glob("*-*.json")):
                shutil.rmtree(working, ignore_errors=True)
            if isinstance(error, OSError) and not error.filename:
                raise OSError(error.errno, error.strerror, str(out)) from None  # that of a full disk names no path
            raise


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty; remove it or give another folder")


class ShardRecords:
    """The records of finished shards in an unfinished folder."""

    def __init__(self, working: Path, identity: dict[str, Any]) -> None:
        self._working = working
        self._folder = working / _RECORDS
        if self._read("identity.json") != identity:
            for path in working.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._folder.mkdir()
            write_json(self._folder / "identity.json", identity)

    def finished(self, part: str) -> list[FinishedShard]:
        """The finished shards of a part, up to the first one that is missing or damaged."""
        found: list[FinishedShard] = []
        while (tree := self._read(f"{part}-{len(found):06d}.json")) is not None:
            try:
                shard = adapter_of(FinishedShard).validate_python(tree)
                entry = shard.entry
                if entry is not None and (self._working / part / entry.name).stat().st_size != entry.bytes:
                    break
            except (OSError, ValueError):
                break
            found.append(shard)
        return found

    def add(self, part: str, number: int, shard: FinishedShard) -> None:
        write_json(self._folder / f"{part}-{number:06d}.json", dataclasses.asdict(shard))

    def _read(self, name: str) -> Any:
        """None if it is missing or damaged: then the work is done again."""
        try:
            return parse_json(read_plain_file(self._folder / name, MAX_JSON_BYTES))
        except (OSError, ValueError):
            return None
