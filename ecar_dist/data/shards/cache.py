"""A node's cache of remote shards, `<root>/<dataset_id>/<name>`: whole shards, proven before anybody sees them.

The data set's id is part of the path, so sets with the same file names never mix. A shard is fetched by one process of
the node at a time, into a temporary file, and appears under its name when its size and hash are right.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

from ecar_dist.data.shards.download import Download, fetch_shard
from ecar_dist.data.shards.manifest import ShardEntry
from ecar_dist.data.shards.proof import ProvenMap, ShardDamaged, map_open_file
from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.node_lock import node_lock, sweep_temporaries
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.remote import join
from ecar_dist.storage.retries import RetryPolicy, Transfer


@dataclass(frozen=True)
class CacheOptions:
    """The node's cache. `root` None: $ECAR_CACHE_DIR, else a folder of this user in the temporary directory."""

    root: Path | None = None
    budget_bytes: int | None = None  # of one set on this node; None: keep all
    threads: int = 16  # ranges in flight, of all shards together
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def folder(self) -> Path:
        """Raises DataError where another user has made the default folder, and could change what is proven there."""
        if chosen := self.root or os.environ.get("ECAR_CACHE_DIR"):
            return Path(chosen)
        default = Path(tempfile.gettempdir(), f"ecar-cache-{os.getuid()}")
        if default.is_symlink() or (default.exists() and default.stat().st_uid != os.getuid()):
            raise DataError(f"the cache folder {default} is not yours; set data.cache.dir, or ECAR_CACHE_DIR")
        return default


class ShardCache:
    """A ShardStore over a URL. Make it after forking: its threads and connections belong to this process."""

    def __init__(self, url: str, dataset_id: str, entries: Sequence[ShardEntry], options: CacheOptions) -> None:
        self.entries, self.evicts = entries, options.budget_bytes is not None
        self._options = options
        self._transfer = Transfer(policy=options.retry)
        self.stats = self._transfer.stats
        self._folder = options.folder / dataset_id
        # one file name of each, however deep the shard lies
        self._urls = [join(url, entry.name) for entry in entries]  # refuses a name that leads elsewhere
        self._paths = [self._folder / quote(entry.name, safe="") for entry in entries]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep_temporaries(self._folder)
        except OSError as error:
            raise DataError(f"cannot use the cache folder {self._folder} ({error}); set data.cache.dir") from None
        self._ranges = DaemonPool(options.threads, "shard-range")
        self._shards = DaemonPool(max(2, options.threads // 4), "shard-fetch")
        self._underway: dict[int, Future[None]] = {}
        self._lock = threading.RLock()  # of _underway; a callback may come from within
        self._future: Mapping[int, int] | None = None  # as `retire` was last told

    def where(self, shard_index: int) -> str:
        return redact(self._urls[shard_index])

    def open(self, shard_index: int) -> ProvenMap:
        path, damaged = self._paths[shard_index], None
        self._finish(shard_index)
        while True:
            try:
                with open(path, "rb", buffering=0) as file:
                    found = os.fstat(file.fileno())
                    return map_open_file(file, path, self.entries[shard_index])
            except FileNotFoundError:  # never here, or evicted by another process since
                pass
            except OSError as error:
                raise DataError(f"cannot read {path} ({error.strerror}); set data.cache.dir to a sound disk") from None
            except ShardDamaged:
                if damaged is not None:
                    raise DataError(
                        f"{path} was damaged again after it was fetched and proven; set data.cache.dir to a sound disk"
                    ) from None
                damaged = found
            self._bring(shard_index, damaged)

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        fitting = self._fitting()
        with self._lock:
            for index in filter(fitting.__contains__, shard_indices):
                if self._transfer.stopping.is_set() or index in self._underway or self._paths[index].exists():
                    continue
                self._underway[index] = self._shards.submit(self._bring, index)
                self._underway[index].add_done_callback(partial(self._tidy, index))

    def retire(self, future: Mapping[int, int]) -> None:
        """The farthest next use goes first, so what is needed soon stays unless the budget cannot hold even that.

        `future` must speak for the whole node: the processes share the files. A file that another process still needs
        is fetched again when it opens it.
        """
        self._future = future
        self._make_room(0)

    def _make_room(self, coming: int) -> None:
        """Evict until `coming` bytes fit into the budget."""
        if self._options.budget_bytes is None or self._future is None:
            return
        future, names = self._future, set(os.listdir(self._folder))
        present = [index for index, path in enumerate(self._paths) if path.name in names]
        total = coming + sum(self.entries[index].bytes for index in present)
        for index in sorted(present, key=lambda index: future.get(index, math.inf), reverse=True):
            if total <= self._options.budget_bytes:
                return
            self._paths[index].unlink(missing_ok=True)
            total -= self.entries[index].bytes

    def _fitting(self) -> Container[int]:
        """The shards that the budget holds until their next use: to bring others now would push these out."""
        if self._options.budget_bytes is None or self._future is None:
            return range(len(self.entries))
        order = sorted(self._future, key=self._future.__getitem__)
        ends = itertools.accumulate(self.entries[index].bytes for index in order)
        return {index for index, end in zip(order, ends, strict=True) if end <= self._options.budget_bytes}

    def close(self) -> None:
        with self._lock:
            self._transfer.stopping.set()
            self._shards.end()
            self._ranges.end()

    def _finish(self, shard_index: int) -> None:
        """Wait for a prefetch of this shard and raise its error; one that still waits its turn is taken over."""
        with self._lock:
            underway = self._underway.pop(shard_index, None)
        if underway is not None and not underway.cancel():
            underway.result()

    def _tidy(self, shard_index: int, done: Future[None]) -> None:
        """Forget a prefetch that succeeded; a failed one waits for the `open` of its shard."""
        if not done.cancelled() and done.exception() is None:
            with self._lock:
                if self._underway.get(shard_index) is done:
                    del self._underway[shard_index]

    def _bring(self, shard_index: int, damaged: os.stat_result | None = None) -> None:
        """Have the shard in the cache. `damaged` is a file there that must go; it counts as the first download."""
        path, entry = self._paths[shard_index], self.entries[shard_index]
        try:
            if self._transfer.stopping.is_set():
                raise CancelledError
            with node_lock(path.with_name(f".{path.name}.lock"), self._transfer.stopping):
                if damaged is not None and path.exists() and _same_file(path.stat(), damaged):
                    path.unlink(missing_ok=True)
                if not path.exists():
                    self._make_room(entry.bytes)
                    self.stats.add(refetches=damaged is not None)
                    download = Download(self._urls[shard_index], path, entry, self._transfer, self._ranges)
                    fetch_shard(download, attempts=1 if damaged is not None else 2)
        except CancelledError:
            raise DataError(f"fetching {self.where(shard_index)} was stopped; start again to go on") from None
        except OSError as error:
            raise DataError(
                f"cannot store {self.where(shard_index)} of {entry.bytes} bytes in {self._folder} ({error.strerror}); "
                "free space there, lower the cache's budget, or set data.cache.dir to another disk"
            ) from None


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """A new file may have the inode of the one that was just removed."""
    return os.path.samestat(one, other) and one.st_mtime_ns == other.st_mtime_ns
