"""Downloads in ranges, from a real S3 server: the file exists with its promised content, or not at all."""

import base64
import errno
import os
import time

import pytest
import xxhash

from ecar_dist.errors import DataError
from ecar_dist.storage import fetch
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.fetch import RemoteFile, WrongContentError, cache_folder, fetch_file
from ecar_dist.storage.hashing import hash_file, hash_open_file
from ecar_dist.storage.retries import ObjectMissing, RetryPolicy, Transfer
from tests.data.object_store import QUICK

BODY = os.urandom(100_000)
HASH = xxhash.xxh3_128_hexdigest(BODY)
RANGE = 30_000


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    monkeypatch.setattr(fetch, "RANGE_BYTES", RANGE)


@pytest.fixture
def remote(object_store):
    object_store.put("a.bin", BODY)
    object_store.break_on()
    return RemoteFile(f"{object_store.url}/a.bin", len(BODY), HASH)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.bin"


@pytest.fixture
def transfer():
    return Transfer(QUICK)


@pytest.fixture(params=["own pool", "shared pool"])
def pool(request):
    if request.param == "own pool":
        yield None
        return
    pool = DaemonPool(2, "test-range")
    yield pool
    pool.end(5)


def left(path):
    return sorted(found.name for found in path.parent.iterdir())


def test_a_file_arrives_in_ranges_once(object_store, remote, path, transfer, pool):
    fetch_file(remote, path, transfer, pool=pool)
    assert path.read_bytes() == BODY
    starts = sorted(int(get["range"][6:].partition("-")[0]) for get in object_store.log("GET"))
    assert starts == list(range(0, len(BODY), RANGE))
    assert transfer.stats.snapshot()["bytes"] == len(BODY)
    assert left(path) == ["a.bin"]


def test_an_empty_file(object_store, path, transfer):
    object_store.put("empty", b"")
    fetch_file(RemoteFile(f"{object_store.url}/empty", 0, xxhash.xxh3_128_hexdigest(b"")), path, transfer)
    assert path.read_bytes() == b""


def test_only_the_failed_range_is_requested_again(object_store, remote, path, transfer, pool):
    object_store.break_on({"kind": "truncate", "at": 1000, "times": 1, "method": "GET"})
    fetch_file(remote, path, transfer, pool=pool)
    assert path.read_bytes() == BODY
    assert len(object_store.log("GET")) == len(range(0, len(BODY), RANGE)) + 1
    assert (transfer.stats.snapshot()["retries"], transfer.stats.snapshot()["refetches"]) == (1, 0)


def test_a_wrong_byte_is_downloaded_again(object_store, remote, path, transfer, pool):
    object_store.break_on({"kind": "corrupt", "at": 600, "times": 1})
    fetch_file(remote, path, transfer, pool=pool)
    assert path.read_bytes() == BODY
    assert transfer.stats.snapshot()["refetches"] == 1


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_wrong_hash_is_an_error_after_the_attempts(object_store, remote, path, transfer, pool, attempts):
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    object_store.put("a.bin", wrong)
    object_store.break_on()
    with pytest.raises(WrongContentError) as caught:
        fetch_file(remote, path, transfer, pool=pool, attempts=attempts, describe_damage=lambda file: "at byte 7")
    for value in (HASH, xxhash.xxh3_128_hexdigest(wrong), "at byte 7"):
        assert value in caught.value.problem
    assert remote.url in str(caught.value)
    assert sum(get["bytes"] for get in object_store.log("GET")) == attempts * len(BODY)
    assert left(path) == []


def test_an_object_of_another_size_is_not_downloaded(object_store, remote, path, transfer):
    object_store.put("a.bin", BODY[:-1])
    object_store.break_on()
    with pytest.raises(WrongContentError, match=f"{len(BODY) - 1} .* {len(BODY)}"):
        fetch_file(remote, path, transfer)
    assert object_store.log("GET") == []
    assert left(path) == []


def test_a_missing_object(object_store, path, transfer):
    with pytest.raises(ObjectMissing, match=r"gone\.bin"):
        fetch_file(RemoteFile(f"{object_store.url}/gone.bin", 5, HASH), path, transfer)
    assert left(path) == []


def test_an_object_that_changes_during_the_download_is_the_fault_of_its_writer(object_store, remote, path, transfer):
    object_store.break_on({"kind": "replace", "body": base64.b64encode(bytes(len(BODY))).decode()})
    with DaemonPool(1, "one-range") as one, pytest.raises(DataError, match=r"a\.bin changed") as caught:
        fetch_file(remote, path, transfer, pool=one)
    assert not isinstance(caught.value, WrongContentError)
    assert left(path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(remote, path, transfer, pool, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        fetch_file(remote, path, transfer, pool=pool)
    assert left(path) == []


def test_an_error_of_one_range_ends_the_others(object_store, remote, path):
    """One range is rejected for good. The others would be retried for a minute."""
    patient = Transfer(RetryPolicy(deadline=60, first_delay=30, longest_delay=30))
    object_store.break_on(
        {"kind": "status", "status": 503, "method": "GET", "times": 2},
        {"kind": "status", "status": 403, "method": "GET", "times": None},
    )
    began = time.monotonic()
    with pytest.raises(DataError):
        fetch_file(remote, path, patient)
    assert time.monotonic() - began < 20
    assert patient.stopping.is_set()
    assert left(path) == []


def test_a_shared_pool_serves_on_after_an_error(object_store, remote, path, transfer):
    pool = DaemonPool(2, "test-range")
    object_store.break_on({"kind": "status", "status": 403, "method": "GET", "times": 1})
    with pytest.raises(DataError, match="HTTP 403"):
        fetch_file(remote, path, transfer, pool=pool)
    assert not transfer.stopping.is_set()
    fetch_file(remote, path, transfer, pool=pool)
    assert path.read_bytes() == BODY
    pool.end(5)


def test_the_hash_of_a_file(path):
    path.write_bytes(BODY)
    assert hash_file(path) == HASH
    with path.open("rb", buffering=0) as file:
        file.seek(17)
        assert hash_open_file(file) == HASH


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("ECAR_CACHE_DIR", "/from/environment")
    assert str(cache_folder("/chosen")) == "/chosen"
    assert str(cache_folder(None)) == "/from/environment"
    monkeypatch.delenv("ECAR_CACHE_DIR")
    assert cache_folder(None) == tmp_path / f"ecar-cache-{os.getuid()}"
