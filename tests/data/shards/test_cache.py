import base64
import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecar_dist.data.shards.cache import CacheOptions, ShardCache
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.proof import ShardDamaged
from ecar_dist.data.shards.store import open_store
from ecar_dist.errors import DataError
from ecar_dist.storage import fetch
from ecar_dist.storage.retries import ObjectMissing, RetryPolicy
from tests.data.latent_sets import write_set
from tests.data.object_store import IMPATIENT, QUICK, SECRETS
from tests.data.process import wait_until
from tests.fork_server import CONTEXT

RANGE = 30_000  # of shards of about 87 KB
PATIENT = RetryPolicy(deadline=60, request_seconds=60, first_delay=0.05)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    monkeypatch.setattr(fetch, "RANGE_BYTES", RANGE)


class Remote:
    """A set of three shards in the object store."""

    def __init__(self, object_store, folder, prefix="set/", **options):
        folder.mkdir()
        write_set(folder, **options)
        self.folder, self.objects, self.prefix = folder, object_store, prefix
        self.manifest = load_manifest(folder)
        self.url = object_store.put_folder(folder, prefix)
        object_store.break_on()

    def store(self, root=None, budget=None, threads=4, retry=QUICK):
        options = CacheOptions(root, budget, threads, retry)
        return open_store(self.url, self.manifest.dataset_id, self.manifest.shards, options)

    def body(self, index):
        return (self.folder / self.manifest.shards[index].name).read_bytes()

    def cached(self, index):
        root = Path(os.environ["ECAR_CACHE_DIR"])
        return root / self.manifest.dataset_id / self.manifest.shards[index].name

    def gets(self, index=None):
        return self.objects.log(match=".tar" if index is None else self.manifest.shards[index].name)


@pytest.fixture
def remote(object_store, tmp_path):
    return Remote(object_store, tmp_path / "set")


@pytest.fixture
def store(remote):
    store = remote.store()
    yield store
    store.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_shard_is_fetched_once_in_ranges(remote, store):
    assert isinstance(store, ShardCache)
    for _ in range(2):
        assert store.open(1)[:] == remote.body(1)
    asked = sorted(int(get["range"][6:].partition("-")[0]) for get in remote.gets())
    assert asked == list(range(0, len(remote.body(1)), RANGE))
    assert sum(get["bytes"] for get in remote.gets()) == len(remote.body(1)) == store.stats.snapshot()["bytes"]
    assert names(remote.cached(1).parent) == ["000001.tar"]
    assert store.where(1) == f"{remote.url}/000001.tar"


def test_another_process_finds_it(remote, store):
    store.open(0)
    remote.objects.break_on()
    assert remote.store().open(0)[:] == remote.body(0)
    assert remote.gets() == []


def test_sets_with_the_same_names_do_not_mix(remote, object_store, tmp_path, store):
    other = Remote(object_store, tmp_path / "other", prefix="other/", flip=True)
    assert other.manifest.shards[0].name == remote.manifest.shards[0].name
    assert store.open(0)[:] == remote.body(0)
    assert other.store().open(0)[:] == other.body(0) != remote.body(0)
    assert store.open(0)[:] == remote.body(0)


FAULTS = {
    "503 burst": {"kind": "status", "status": 503, "times": 5},
    "reset": {"kind": "reset", "at": 1000, "times": 3},
    "cut": {"kind": "truncate", "at": 1000, "times": 3},
    "short": {"kind": "short", "at": 1000, "times": 3},
    "slow": {"kind": "drip", "delay": 0.01, "times": 2},
    "stat": {"kind": "status", "status": 503, "times": 3, "method": "HEAD"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_leave_no_trace(remote, fault):
    store = remote.store(retry=IMPATIENT if fault == "slow" else QUICK)
    remote.objects.break_on({**FAULTS[fault], "match": ".tar"})
    assert store.open(0)[:] == remote.body(0)
    counts = store.stats.snapshot()
    assert (counts["retries"], counts["refetches"]) == (FAULTS[fault]["times"], 0)
    store.close()


def test_a_wrong_byte_is_fetched_again(remote, store):
    remote.objects.break_on({"kind": "corrupt", "at": 600, "match": ".tar"})
    assert store.open(0)[:] == remote.body(0)
    assert store.stats.snapshot()["refetches"] == 1


def test_a_wrong_byte_that_stays_is_an_error_after_one_more_download(remote, store):
    remote.objects.break_on({"kind": "corrupt", "at": 600, "match": ".tar", "times": None})
    with pytest.raises(ShardDamaged) as caught:
        store.open(0)
    text = str(caught.value)
    assert f"{remote.url}/000000.tar" in text
    assert remote.manifest.shards[0].xxh3_128 in text
    assert " byte 0" in text
    assert "\n" not in text
    assert sum(get["bytes"] for get in remote.gets()) == 2 * len(remote.body(0))
    assert names(remote.cached(0).parent) == []


@pytest.mark.parametrize("damage", ["byte", "cut", "empty"])
def test_a_damaged_file_in_the_cache_is_fetched_again(remote, store, damage):
    store.open(0)
    whole = remote.body(0)
    corrupted = {"byte": whole[:-1] + b"x", "cut": whole[:5000], "empty": b""}[damage]
    remote.cached(0).write_bytes(corrupted)
    remote.objects.break_on()
    assert store.open(0)[:] == whole
    assert sum(get["bytes"] for get in remote.gets()) == len(whole)
    assert store.stats.snapshot()["refetches"] == 1


def test_a_damaged_file_counts_as_the_first_download(remote, store):
    store.open(0)
    remote.cached(0).write_bytes(b"x")
    remote.objects.break_on({"kind": "corrupt", "at": 600, "match": ".tar", "times": None})
    with pytest.raises(ShardDamaged, match=r"000000\.tar .*xxh3_128"):
        store.open(0)
    assert sum(get["bytes"] for get in remote.gets()) == len(remote.body(0))


def test_an_object_that_changes_while_it_is_read(remote):
    store = remote.store(threads=1)  # the second range is requested after the change
    swapped = base64.b64encode(bytes(len(remote.body(0)))).decode()
    remote.objects.break_on({"kind": "replace", "match": ".tar", "body": swapped})
    with pytest.raises(DataError, match=r"000000\.tar .*version \"\w+\""):
        store.open(0)
    assert names(remote.cached(0).parent) == []
    store.close()


def test_an_object_of_another_size_is_not_fetched(remote, store):
    remote.objects.put("set/000000.tar", remote.body(0)[:-512])
    size = len(remote.body(0))
    with pytest.raises(ShardDamaged, match=rf"000000\.tar .*\b{size - 512} .* {size}\b"):
        store.open(0)
    assert remote.gets() == []


def test_endless_failure_ends_in_one_line_and_leaves_nothing(remote):
    store = remote.store(retry=RetryPolicy(deadline=2, first_delay=0.05, longest_delay=0.2))
    remote.objects.break_on({"kind": "status", "status": 503, "match": ".tar", "times": None})
    with pytest.raises(DataError, match="HTTP 503 SlowDown") as caught:
        store.open(0)
    assert "\n" not in str(caught.value)
    assert not [secret for secret in SECRETS.values() if secret in str(caught.value)]
    assert names(remote.cached(0).parent) == []
    store.close()


def test_a_full_disk_says_how_much_it_needs(remote, store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(DataError, match=rf"000000\.tar .*\b{len(remote.body(0))} .*No space left"):
                store.open(0)
        assert names(remote.cached(0).parent) == []
    assert store.open(0)[:] == remote.body(0)


def test_a_cache_folder_that_cannot_be(remote, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "file"))):
        remote.store(root=tmp_path / "file")


def test_prefetch_downloads_in_order_and_open_waits_for_it(remote):
    store = remote.store(threads=1)
    remote.objects.break_on({"kind": "delay", "delay": 1, "match": ".tar"})
    began = time.monotonic()
    store.prefetch([2, 0, 1])
    assert time.monotonic() - began < 0.9
    wait_until(remote.gets)
    assert store.open(2)[:] == remote.body(2)
    for index in (0, 1):
        assert store.open(index)[:] == remote.body(index)
    assert sum(get["bytes"] for get in remote.gets()) == sum(entry.bytes for entry in remote.manifest.shards)
    order = [get["path"].rpartition("/")[2] for get in remote.gets()]
    before = order[: order.index("000001.tar")]
    assert max(before.count("000002.tar"), before.count("000000.tar")) == 4, "the last begins when one of two is there"
    store.close()


def test_open_does_not_queue_behind_what_is_needed_later(remote):
    """Two downloads are in progress and stall. The third is still waiting, and `open` takes it over."""
    store = remote.store(threads=3, retry=RetryPolicy(deadline=30, request_seconds=20, first_delay=0.05))
    remote.objects.break_on(
        *({"kind": "stall", "method": "GET", "match": name, "times": 1} for name in ("000000.tar", "000001.tar"))
    )
    store.prefetch([0, 1, 2])
    began = time.monotonic()
    assert store.open(2)[:] == remote.body(2)
    assert time.monotonic() - began < 15
    store.close()


def test_an_error_of_a_prefetch_is_raised_by_open(remote, object_store, tmp_path):
    write_set(tmp_path)
    for name in ("000000.tar", "000002.tar"):
        object_store.put(f"partial/{name}", (tmp_path / name).read_bytes())
    options = CacheOptions(retry=QUICK, threads=4)
    store = open_store(f"{object_store.url}/partial", "id", remote.manifest.shards, options)
    store.prefetch([0, 1, 2])
    assert store.open(0)[:] == remote.body(0)
    assert store.open(2)[:] == remote.body(2)
    wait_until(lambda: len(object_store.log("HEAD", "000001.tar")) == 1)
    store.prefetch([1])
    time.sleep(0.2)
    assert len(object_store.log("HEAD", "000001.tar")) == 1, "it is not asked for again before somebody heard of it"
    with pytest.raises(ObjectMissing, match=r"partial/000001\.tar"):
        store.open(1)
    object_store.put("partial/000001.tar", (tmp_path / "000001.tar").read_bytes())
    assert store.open(1)[:] == remote.body(1)
    store.close()


def test_the_farthest_goes_first_down_to_the_budget(remote):
    sizes = [entry.bytes for entry in remote.manifest.shards]
    store = remote.store(budget=sizes[0] + sizes[2])
    maps = [store.open(index) for index in range(3)]
    store.retire({0: 1, 1: 2, 2: 0})
    assert names(remote.cached(0).parent) == ["000000.tar", "000002.tar"]
    store.open(1)
    assert names(remote.cached(0).parent) == ["000001.tar", "000002.tar"], "room is made before a shard comes"
    store.retire({1: 1, 0: 7})  # 2 is not needed any more
    store.open(0)
    assert names(remote.cached(0).parent) == ["000000.tar"], "2 goes first; 0 and 1 together are over the budget"
    assert [mapped[:] for mapped in maps] == [remote.body(index) for index in range(3)], "maps outlive their files"
    remote.objects.break_on()
    assert store.open(2)[:] == remote.body(2)
    assert len(remote.gets(2)) == 2
    store.close()


def test_shards_that_the_budget_cannot_keep_are_not_prefetched(remote):
    sizes = [entry.bytes for entry in remote.manifest.shards]
    store = remote.store(budget=sizes[0] + sizes[2])
    store.retire({0: 0, 2: 1, 1: 2})
    store.prefetch([1, 0, 2])
    wait_until(lambda: names(remote.cached(0).parent) == ["000000.tar", "000002.tar"])
    assert not remote.gets(1)
    assert store.open(1)[:] == remote.body(1)
    assert names(remote.cached(0).parent) == ["000001.tar"]
    store.close()


def test_without_a_budget_all_stay(remote, store):
    for index in range(3):
        store.open(index)
    store.retire({})
    assert len(names(remote.cached(0).parent)) == 3


def test_a_shard_evicted_before_it_is_opened_is_fetched_again(remote, store, monkeypatch):
    download, evictions = ShardCache._download, iter([True, True, False])

    def download_and_lose(self, index, damaged=None):
        download(self, index, damaged)
        if next(evictions):
            remote.cached(index).unlink()

    monkeypatch.setattr(ShardCache, "_download", download_and_lose)
    assert store.open(0)[:] == remote.body(0)
    assert sum(get["bytes"] for get in remote.gets()) == 3 * len(remote.body(0))


def test_close_ends_what_runs(remote):
    store = remote.store(retry=RetryPolicy(deadline=60, first_delay=30, longest_delay=30))
    remote.objects.break_on({"kind": "status", "status": 503, "match": ".tar", "times": None})
    store.prefetch([0, 1, 2])
    time.sleep(0.3)
    began = time.monotonic()
    store.close()
    store.close()
    store.prefetch([0])
    with pytest.raises(DataError, match="stopped"):
        store.open(0)
    with pytest.raises(DataError, match="stopped"):
        store.open(2)
    assert time.monotonic() - began < 12


def test_a_program_that_ends_without_closing_does_not_wait(remote):
    remote.objects.break_on({"kind": "status", "status": 503, "match": ".tar", "times": None})
    script = f"""
import time
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.store import CacheOptions, open_store
manifest = load_manifest({remote.url!r})
open_store({remote.url!r}, manifest.dataset_id, manifest.shards, CacheOptions(threads=1)).prefetch([0, 1, 2])
time.sleep(2)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def read_all(environment, url, manifest, root, go, result):
    """What one rank of a node does. Runs in its own process."""
    os.environ.update(environment)
    fetch.RANGE_BYTES = RANGE
    store = open_store(url, manifest.dataset_id, manifest.shards, CacheOptions(root, None, 4, PATIENT))
    result.with_suffix(".ready").touch()
    while not go.exists():
        time.sleep(0.01)
    store.prefetch([0, 1, 2])
    result.write_text(" ".join(hashlib.sha256(store.open(index)[:]).hexdigest() for index in range(3)))
    store.close()


def start(remote, count, folder):
    """Processes that begin to read when `folder`/go appears, and the file that each one writes."""
    folder.mkdir(exist_ok=True)
    results = [folder / f"{time.monotonic_ns()}-{rank}" for rank in range(count)]
    shared = (dict(os.environ), remote.url, remote.manifest, folder / "node", folder / "go")
    readers = [CONTEXT.Process(target=read_all, args=(*shared, result)) for result in results]
    for reader in readers:
        reader.start()
    wait_until(lambda: all(result.with_suffix(".ready").exists() for result in results))
    return readers, results


def test_sixteen_processes_make_one_download(remote, tmp_path):
    """No reader sees a partial shard: a file that appears under a shard's name always has its full size."""
    remote.objects.break_on({"kind": "delay", "delay": 0.1, "match": ".tar", "times": None})
    readers, results = start(remote, 16, tmp_path / "run")
    node, sizes = tmp_path / "run/node" / remote.manifest.dataset_id, {entry.bytes for entry in remote.manifest.shards}
    (tmp_path / "run/go").touch()
    while any(reader.is_alive() for reader in readers):
        assert {path.stat().st_size for path in node.glob("*.tar")} <= sizes
        time.sleep(0.01)
    assert {result.read_text() for result in results} == {" ".join(entry.sha256 for entry in remote.manifest.shards)}
    for index, entry in enumerate(remote.manifest.shards):
        ranges = [get["range"] for get in remote.gets(index)]
        assert len(ranges) == len(set(ranges)) == -(-entry.bytes // RANGE)
    assert names(node) == ["000000.tar", "000001.tar", "000002.tar"]


def test_a_killed_downloader_is_replaced(remote, tmp_path):
    remote.objects.break_on({"kind": "stall", "match": "000000.tar"})
    run = tmp_path / "run"
    node = run / "node" / remote.manifest.dataset_id
    (first,), _ = start(remote, 1, run)
    (run / "go").touch()
    wait_until(lambda: remote.gets(0))
    assert list(node.glob(".000000.tar.*.tmp"))
    (second,), (result,) = start(remote, 1, run)
    wait_until(lambda: (node / "000002.tar").exists())
    assert second.is_alive()
    assert not (node / "000000.tar").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(60)
    assert result.read_text() == " ".join(entry.sha256 for entry in remote.manifest.shards)
    remote.store(root=run / "node").close()  # removes what the dead process left
    assert names(node) == ["000000.tar", "000001.tar", "000002.tar"]


def test_a_cache_folder_that_somebody_else_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("ECAR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    default = CacheOptions().folder
    assert default == tmp_path / f"ecar-cache-{os.getuid()}"
    default.mkdir()
    assert CacheOptions().folder == default
    monkeypatch.setattr("os.getuid", lambda: 12345)
    other = tmp_path / "ecar-cache-12345"
    other.mkdir()
    with pytest.raises(DataError, match=rf"{other} .*data\.cache\.dir"):
        _ = CacheOptions().folder
    other.rmdir()
    other.symlink_to(default)
    with pytest.raises(DataError, match=str(other)):
        _ = CacheOptions().folder
    assert CacheOptions(root=other).folder == other
