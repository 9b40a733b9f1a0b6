"""Open the shards of a data set: in a local folder, or behind a URL through the node's cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ecar_dist.data.shards.cache import CacheOptions, OpenedAs, ShardCache, as_map
from ecar_dist.data.shards.entries import ShardEntry
from ecar_dist.data.shards.proof import check_presence, local_folder, map_verified
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.remote import file_in, is_remote
from ecar_dist.storage.retries import TransferStats

# While one thread waits for the disk, the other one hashes or checks what was read.
_PROVING_THREADS = 2

Opened = TypeVar("Opened", covariant=True)


class ShardStore(Protocol[Opened]):
    """The shards of one data set, by their index in its manifest. Safe to use from several threads.

    A store makes an `Opened` from each proven map, see `open_store`.
    """

    entries: Sequence[ShardEntry]
    stats: TransferStats
    evicts: bool  # whether `retire` may delete files; the disk space of a deleted file is freed with its last map

    def open(self, shard_index: int) -> Opened:
        """The complete shard, mapped read-only, with size and xxh3_128 checked. Waits for its download.

        The map belongs to the caller. Raises ShardDamaged if the content is wrong, DataError if the shard cannot be
        read. Both name the shard. Raises what `opened` raises.
        """

    def where(self, shard_index: int) -> str:
        """Path or URL without secrets, for messages."""

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """Prepare shards in the background, in this order. An error is raised when its shard is opened."""

    def retire(self, future: Mapping[int, int]) -> None:
        """Evict shards until the rest fit into the budget. Maps that were handed out stay valid.

        `future` maps each shard to its rank in the order of next use (0 is next). This node does not need the shards
        that are not in `future`.
        """

    def close(self) -> None:
        """Stop all background work. Safe to call twice."""


def open_store(
    folder: str | Path,
    dataset_id: str,
    entries: Sequence[ShardEntry],
    cache: CacheOptions,
    opened: OpenedAs[Any] = as_map,
    checked: Iterable[int] | None = None,
) -> ShardStore[Any]:
    """The store of a data set. Raises DataError if a local shard is missing or has a wrong size.

    checked: the indices of the shards whose files are checked now; None: all. The others are checked when first used.

    `opened(mapped, where, entry)` makes the result of `ShardStore.open` from each proven map. For local shards it runs
    in the background, with the proof. Shards behind a URL are checked after their download.
    """
    if is_remote(folder):
        return ShardCache(str(folder), dataset_id, entries, cache, opened)
    return LocalShards(folder, entries, opened, checked)


class LocalShards:
    """Shards on a local or mounted file system, mapped in place. Threads prove the shards that are needed next."""

    evicts = False

    def __init__(
        self,
        folder: str | Path,
        entries: Sequence[ShardEntry],
        opened: OpenedAs[Any] = as_map,
        checked: Iterable[int] | None = None,
    ) -> None:
        """Arguments as in `open_store`."""
        self.entries = entries
        self._opened = opened
        self.stats = TransferStats()
        self._folder = local_folder(folder)
        self._pool = DaemonPool(_PROVING_THREADS, "shard-prove")
        self._prefetched: dict[int, Future[Any]] = {}  # by shard index
        check_presence(folder, entries if checked is None else map(entries.__getitem__, checked))

    def open(self, shard_index: int) -> Any:
        # A prefetch that has not started is cancelled, and the shard is proven here.
        prefetched = self._prefetched.pop(shard_index, None)
        if prefetched is not None and not prefetched.cancel():
            return prefetched.result()
        return self._prove(shard_index)

    def where(self, shard_index: int) -> str:
        return str(self._path(shard_index))

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """As ShardStore.prefetch. Drops shards of earlier calls that are not listed: a map holds a file descriptor."""
        for index in self._prefetched.keys() - set(shard_indices):
            self._prefetched.pop(index).cancel()
        for index in shard_indices:
            if index not in self._prefetched:
                self._prefetched[index] = self._pool.submit(self._prove, index)

    def retire(self, future: Mapping[int, int]) -> None:
        """Does nothing: the files are not a cache."""

    def close(self) -> None:
        self._pool.end()

    def _prove(self, shard_index: int) -> Any:
        path = self._path(shard_index)
        entry = self.entries[shard_index]
        return self._opened(map_verified(path, entry), str(path), entry)

    def _path(self, shard_index: int) -> Path:
        return file_in(self._folder, self.entries[shard_index].name)
