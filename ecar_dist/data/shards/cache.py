"""A cache of remote shards on each node, `<root>/<dataset_id>/<name>`, that contains only complete and proven shards.

The path contains the id of the data set, so sets with equal file names do not mix. Each shard is downloaded by only one
process of the node at a time, into a temporary file. The file is renamed after its size and hash have been checked.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from ecar_dist.data.shards.entries import ShardEntry, ShardTable
from ecar_dist.data.shards.proof import ProvenMap, ShardDamaged, describe_damage_in, map_open_file
from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.fetch import RemoteFile, WrongContentError, cache_folder, fetch_file
from ecar_dist.storage.node_lock import node_lock, sweep_temporaries
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import join
from ecar_dist.storage.retries import RetryPolicy, Transfer

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class CacheOptions:
    """Settings of the node's cache."""

    root: Path | None = None  # None: $ECAR_CACHE_DIR, or a folder of this user in the temporary directory
    budget_bytes: int | None = None  # for one data set on this node; None: keep everything
    threads: int = 16  # ranges in flight, of all shards together
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def folder(self) -> Path:
        """The root as a path. Raises DataError if the default folder belongs to another user, who could edit shards."""
        return cache_folder(self.root)


OpenedAs = Callable[[ProvenMap, str, ShardEntry], Opened]  # the second argument is a path or URL for messages


def as_map(mapped: ProvenMap, where: str, entry: ShardEntry) -> ProvenMap:
    """The `OpenedAs` that leaves the map as it is."""
    return mapped


class ShardCache:
    """A ShardStore for a URL. Create it after forking: its threads and connections belong to one process."""

    def __init__(
        self,
        url: str,
        dataset_id: str,
        entries: Sequence[ShardEntry],
        options: CacheOptions,
        opened: OpenedAs[Any] = as_map,
    ) -> None:
        self.entries = entries
        self._opened = opened
        self.evicts = options.budget_bytes is not None
        self._options = options
        self._transfer = Transfer(policy=options.retry)
        self.stats = self._transfer.stats

        # The cached file of a shard in a subfolder has one quoted name. `join` rejects names that leave the folder.
        self._folder = options.folder / dataset_id
        self._url = url
        self._indices: dict[str, int] = {}  # by the name of the cached file
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep_temporaries(self._folder)
        except OSError as error:
            raise DataError(f"cannot use the cache folder {self._folder} ({error}); set data.cache.dir") from None

        # Several shards are downloaded at a time, and their ranges share one pool of connections.
        self._ranges = DaemonPool(options.threads, "shard-range")
        self._shards = DaemonPool(max(2, options.threads // 4), "shard-fetch")
        self._downloads: dict[int, Future[None]] = {}  # prefetched shards, by index
        self._lock = threading.RLock()  # guards _downloads; reentrant, because a callback may run while it is held
        self._future: Mapping[int, int] | None = None  # the argument of the last `retire`

    def where(self, shard_index: int) -> str:
        return redact(join(self._url, self.entries[shard_index].name))

    def open(self, shard_index: int) -> Any:
        entry = self.entries[shard_index]
        path = self._path(entry)
        damaged = None  # the state of a cached file that was damaged
        self._finish_prefetch(shard_index)
        while True:
            try:
                with open(path, "rb", buffering=0) as file:
                    found = os.fstat(file.fileno())
                    mapped = map_open_file(file, path, entry)
                return self._opened(mapped, self.where(shard_index), entry)
            except FileNotFoundError:  # not downloaded yet, or evicted by another process
                pass
            except OSError as error:
                raise DataError(
                    f"cannot read {path} ({error.strerror}); set data.cache.dir to a disk that works"
                ) from None
            except ShardDamaged:
                # Replace a damaged file once. If the new one is damaged too, the disk is at fault.
                if damaged is not None:
                    raise DataError(
                        f"{path} was damaged again after its download was checked; set data.cache.dir to another disk"
                    ) from None
                damaged = found
            self._download(shard_index, damaged)

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        fitting = self._fitting()
        with self._lock:
            for index in filter(fitting.__contains__, shard_indices):
                if self._transfer.stopping.is_set() or index in self._downloads:
                    continue
                if self._path(self.entries[index]).exists():
                    continue
                self._downloads[index] = self._shards.submit(self._download, index)
                self._downloads[index].add_done_callback(partial(self._forget_prefetch, index))

    def retire(self, future: Mapping[int, int]) -> None:
        """Evict shards until the rest fit into the budget, starting with the farthest next use.

        `future` must cover all processes of the node, because they share the files. A file that is evicted too early
        is downloaded again when it is opened.
        """
        self._future = future
        self._make_room(0)

    def close(self) -> None:
        with self._lock:
            self._transfer.stopping.set()
            self._shards.end()
            self._ranges.end()

    def _make_room(self, needed: int) -> None:
        """Evict until `needed` more bytes fit into the budget."""
        budget = self._options.budget_bytes
        if budget is None or self._future is None:
            return

        # What is cached on this node now, whichever process downloaded it?
        cached = self._cached()
        total = needed + sum(found.st_size for _, found in cached.values())

        # The cost depends on the number of cached files, not on the number of shards.
        future = self._future
        for index in sorted(cached, key=lambda index: future.get(index, math.inf), reverse=True):
            if total <= budget:
                return
            path, found = cached[index]
            path.unlink(missing_ok=True)
            total -= found.st_size

    def _cached(self) -> dict[int, tuple[Path, os.stat_result]]:
        """The shards in the folder, by index. Temporary files and locks are not shards."""
        found = {}
        with os.scandir(self._folder) as listing:
            for file in listing:
                index = self._index_of(file.name)
                with contextlib.suppress(FileNotFoundError):  # another process has evicted it
                    if index is not None:
                        found[index] = (self._folder / file.name, file.stat())
        return found

    def _index_of(self, name: str) -> int | None:
        """The shard whose cached file has this name; None if there is none. Each shard is looked up once."""
        if not self._indices and not isinstance(self.entries, ShardTable):
            self._indices = {self._path(entry).name: index for index, entry in enumerate(self.entries)}
        found = self._indices.get(name)
        if found is None and isinstance(self.entries, ShardTable):
            found = self.entries.find(unquote(name))
            if found is not None and self._path(self.entries[found]).name == name:
                self._indices[name] = found
        return self._indices.get(name)

    def _path(self, entry: ShardEntry) -> Path:
        """Where a shard is cached. Raises DataError for a name that leads outside the set."""
        join(self._url, entry.name)
        return self._folder / quote(entry.name, safe="")

    def _fitting(self) -> Container[int]:
        """The shards that the budget can hold until their next use. Prefetching others would evict these."""
        if self._options.budget_bytes is None or self._future is None:
            return range(len(self.entries))
        fitting = set()
        total = 0
        for index in sorted(self._future, key=self._future.__getitem__):
            total += self.entries[index].bytes
            if total > self._options.budget_bytes:
                break
            fitting.add(index)
        return fitting

    def _finish_prefetch(self, shard_index: int) -> None:
        """Wait for the prefetch of this shard and raise its error. Cancels it if it has not started."""
        with self._lock:
            download = self._downloads.pop(shard_index, None)
        if download is not None and not download.cancel():
            download.result()

    def _forget_prefetch(self, shard_index: int, done: Future[None]) -> None:
        """Forget a prefetch that succeeded. The error of a failed one is kept until its shard is opened."""
        if not done.cancelled() and done.exception() is None:
            with self._lock:
                if self._downloads.get(shard_index) is done:
                    del self._downloads[shard_index]

    def _download(self, shard_index: int, damaged: os.stat_result | None = None) -> None:
        """Download the shard if it is not cached. `damaged` is the state of a cached file that must be replaced.

        A damaged file counts as the first of two downloads.
        """
        entry = self.entries[shard_index]
        path = self._path(entry)
        try:
            if self._transfer.stopping.is_set():
                raise CancelledError
            with node_lock(path.with_name(f".{path.name}.lock"), self._transfer.stopping):
                # Another process may have replaced the damaged file while this one waited for the lock.
                if damaged is not None and path.exists() and _same_file(path.stat(), damaged):
                    path.unlink(missing_ok=True)
                if not path.exists():
                    self._make_room(entry.bytes)
                    self.stats.add(refetches=damaged is not None)
                    fetch_file(
                        RemoteFile(join(self._url, entry.name), entry.bytes, entry.xxh3_128),
                        path,
                        self._transfer,
                        pool=self._ranges,
                        attempts=1 if damaged is not None else 2,
                        describe_damage=describe_damage_in,
                    )
        except WrongContentError as error:
            raise ShardDamaged(f"shard {self.where(shard_index)} {error.problem}; upload it again") from None
        except CancelledError:
            raise DataError(f"the download of {self.where(shard_index)} was stopped; start again to continue") from None
        except OSError as error:
            raise DataError(
                f"cannot store {self.where(shard_index)} of {entry.bytes} bytes in {self._folder} ({error.strerror}); "
                "free space there, lower the cache's budget, or set data.cache.dir to another disk"
            ) from None


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are the same version of a file. A new file may reuse the inode of a removed one."""
    return os.path.samestat(one, other) and one.st_mtime_ns == other.st_mtime_ns
