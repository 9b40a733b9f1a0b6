"""Where the shards of a set come from: a local folder mapped in place, or a URL through a node-local cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from ecar_dist.data.shards.cache import CacheOptions, ShardCache
from ecar_dist.data.shards.manifest import ShardEntry
from ecar_dist.data.shards.proof import ProvenMap, check_presence, local_folder, map_verified
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.remote import file_in, is_remote
from ecar_dist.storage.retries import TransferStats


class ShardStore(Protocol):
    """The shards of one set, by their place in its manifest. Safe to use from many threads."""

    entries: Sequence[ShardEntry]
    stats: TransferStats
    evicts: bool  # whether `retire` may remove files: who keeps their maps keeps their disk space

    def open(self, shard_index: int) -> ProvenMap:
        """The whole shard, mapped read-only; waits until it is here. Size and xxh3_128 were checked on the way.

        Raises DataError naming the shard where it is missing, damaged or out of reach. The map belongs to the caller.
        """

    def where(self, shard_index: int) -> str:
        """Local path, or URL without secrets, for messages."""

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """Start bringing shards, in the order of need; returns at once. An error waits for the `open` of its shard."""

    def retire(self, future: Mapping[int, int]) -> None:
        """Evict down to the budget; `future[shard_index]` is its place in the order of next use (0 is next).

        A shard that is absent is not needed by this node. Maps already handed out stay valid.
        """

    def close(self) -> None:
        """End what runs in the background. Safe to call twice."""


def open_store(folder: str | Path, dataset_id: str, entries: Sequence[ShardEntry], cache: CacheOptions) -> ShardStore:
    """The store of a set. Raises DataError where a local shard is missing or cut; a URL's are checked on arrival."""
    if is_remote(folder):
        return ShardCache(str(folder), dataset_id, entries, cache)
    return LocalShards(folder, entries)


class LocalShards:
    """Shards on a local or mounted file system, mapped where they lie. One thread proves ahead what is needed next."""

    evicts = False

    def __init__(self, folder: str | Path, entries: Sequence[ShardEntry]) -> None:
        self.entries = entries
        self.stats = TransferStats()
        self._folder = local_folder(folder)
        self._pool = DaemonPool(1, "shard-prove")
        self._ahead: dict[int, Future[ProvenMap]] = {}
        check_presence(folder, entries)

    def open(self, shard_index: int) -> ProvenMap:
        proving = self._ahead.pop(shard_index, None)
        if proving is not None and not proving.cancel():
            return proving.result()
        return self._prove(shard_index)  # one that still waits its turn is taken over

    def where(self, shard_index: int) -> str:
        return str(self._path(shard_index))

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """As ShardStore.prefetch. What is no longer asked for is let go: its map would hold a file descriptor."""
        for index in self._ahead.keys() - set(shard_indices):
            self._ahead.pop(index).cancel()
        for index in shard_indices:
            if index not in self._ahead:
                self._ahead[index] = self._pool.submit(self._prove, index)

    def retire(self, future: Mapping[int, int]) -> None:
        """Nothing of ours to evict."""

    def close(self) -> None:
        self._pool.end()

    def _prove(self, shard_index: int) -> ProvenMap:
        return map_verified(self._path(shard_index), self.entries[shard_index])

    def _path(self, shard_index: int) -> Path:
        return file_in(self._folder, self.entries[shard_index].name)
