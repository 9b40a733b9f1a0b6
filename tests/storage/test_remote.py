import http.server
import multiprocessing
import threading
import time
import traceback
from pathlib import Path

import pytest

from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from ecar_dist.storage.remote import (
    is_remote,
    join,
    list_files,
    local_path,
    meant_url,
    read_bytes,
    read_object,
    read_range,
    stat,
    upload,
)
from ecar_dist.storage.retries import ObjectMissing, RetryPolicy, Transfer
from tests.conftest import free_port
from tests.data.object_store import IMPATIENT, QUICK, SECRETS

BODY = bytes(range(256)) * 64  # 16 KiB


@pytest.fixture
def transfer():
    return Transfer(QUICK)


@pytest.fixture
def url(object_store):
    object_store.put("set/a.tar", BODY)
    return f"{object_store.url}/set/a.tar"


def test_urls_and_paths():
    assert not any(map(is_remote, ("/a", "a", "file:///a", Path("/a"))))
    assert all(map(is_remote, ("s3://b/k", "memory://x", "https://host/set")))
    assert local_path("file:///a/b") == local_path("/a/b")
    assert join("file:///a", "b") == join("/a/", "b") == "/a/b"
    assert join("s3://bucket/set/", "b") == "s3://bucket/set/b"
    assert join("https://host/set?sig=x", "b") == "https://host/set/b?sig=x"


def test_reading_is_exact(object_store, url, transfer):
    assert stat(url, transfer).size == len(BODY)
    assert read_bytes(url, transfer) == BODY
    object_store.break_on()
    assert read_range(url, 1000, 3000, transfer) == BODY[1000:3000]
    assert [entry["range"] for entry in object_store.log()] == ["bytes=1000-2999"]
    object_store.put("empty", b"")
    assert read_bytes(f"{object_store.url}/empty", transfer) == b""
    assert transfer.stats.snapshot()["bytes"] == len(BODY) + 2000


def test_a_version_changes_with_its_object(object_store, url, transfer):
    before = stat(url, transfer)
    assert stat(url, transfer) == before
    object_store.put("set/a.tar", BODY[::-1])
    assert stat(url, transfer) != before


TRANSIENT = {
    "503 burst": {"kind": "status", "status": 503, "times": 3},
    "500": {"kind": "status", "status": 500, "code": "InternalError"},
    "429": {"kind": "status", "status": 429},
    "408": {"kind": "status", "status": 408, "code": "RequestTimeout"},
    "reset at once": {"kind": "reset", "at": 0},
    "reset in the body": {"kind": "reset", "at": 700, "times": 2},
    "cut body": {"kind": "truncate", "at": 700},
    "wrong length": {"kind": "short", "at": 700, "times": 2},
    "stall": {"kind": "stall"},
    "drip": {"kind": "drip", "delay": 0.01},
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_temporary_fault_costs_a_retry(object_store, url, fault):
    transfer = Transfer(IMPATIENT if fault in ("stall", "drip") else QUICK)
    object_store.break_on(TRANSIENT[fault])
    assert read_range(url, 0, 4096, transfer) == BODY[:4096]
    times, counts = TRANSIENT[fault].get("times", 1), transfer.stats.snapshot()
    assert counts["retries"] == times
    assert len(object_store.log()) == counts["requests"] == times + 1, "the underlying library retries on its own"


@pytest.mark.parametrize("kind", ["status", "stall", "drip", "short", "reset"])
def test_a_permanent_fault_ends_with_one_line(object_store, url, kind):
    object_store.break_on({"kind": kind, "status": 503, "at": 5, "delay": 0.05, "times": None})
    seconds = 0.3 if kind in ("stall", "drip") else 2.0
    transfer = Transfer(RetryPolicy(deadline=1.5, request_seconds=seconds, first_delay=0.05, longest_delay=0.1))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"after \d+ attempts in \d s: .+; check the network and the store") as caught:
        read_range(url, 0, 4096, transfer)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)
    assert ("HTTP 503 SlowDown" in str(caught.value)) == (kind == "status")
    assert len(object_store.log()) >= 3


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (403, "AccessDenied", "check the credentials"),
        (400, "InvalidRequest", "check the credentials"),
        (404, "NoSuchKey", "check the URL"),
        (416, "InvalidRange", "check the URL and the settings"),
    ],
)
def test_a_refusal_is_final_after_one_request(object_store, url, transfer, status, code, fix):
    object_store.break_on({"kind": "status", "status": status, "code": code, "times": None})
    with pytest.raises(DataError, match=rf"failed at once: HTTP {status} {code} .*; {fix}") as caught:
        read_range(url, 0, 4096, transfer)
    assert len(object_store.log()) == 1
    assert isinstance(caught.value, ObjectMissing) == (status == 404)


def test_a_missing_object_is_missing(object_store, transfer):
    for read in (stat, read_bytes, list_files):
        with pytest.raises(ObjectMissing, match=r"no such object; check the URL"):
            read(f"{object_store.url}/nothing", transfer)
    assert transfer.stats.snapshot()["retries"] == 0
    with pytest.raises(ObjectMissing, match="does not exist"):
        read_bytes("/no/such/file")


@pytest.mark.parametrize("times", [1, None])
def test_expired_credentials_are_read_again_once(object_store, url, transfer, times):
    object_store.break_on({"kind": "status", "status": 400, "code": "ExpiredToken", "times": times})
    if times:
        assert read_range(url, 0, 10, transfer) == BODY[:10]
    else:
        with pytest.raises(DataError, match="ExpiredToken"):
            read_range(url, 0, 10, transfer)
    assert len(object_store.log()) == 2


def test_credentials_given_after_a_failure_are_used(object_store, url, transfer, monkeypatch):
    monkeypatch.setattr(remote, "_filesystems", {})  # as in a process that has read nothing yet
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="Credentials"):
        read_range(url, 0, 10, transfer)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS["AWS_ACCESS_KEY_ID"])
    assert read_range(url, 0, 10, transfer) == BODY[:10]


def test_listing_is_whole_and_sorted(object_store, transfer):
    names = ["top", "b/2", "b/1", "a/deep/er/x", "a/y"]
    for name in names:
        object_store.put(f"set/{name}", b"x" * len(name))
    object_store.put("set/b/", b"")  # a folder marker, as some tools leave it
    object_store.put("settled/other", b"")
    assert list_files(f"{object_store.url}/set/", transfer) == sorted((name, len(name)) for name in names)
    object_store.put("set/b/3", b"new")
    assert ("b/3", 3) in list_files(f"{object_store.url}/set/", transfer), "listings must not be cached"


def test_a_failed_page_repeats_one_folder(object_store, transfer):
    for name in ("a/1", "b/1", "c/1"):
        object_store.put(f"set/{name}", b"x")
    object_store.break_on({"kind": "status", "status": 503, "match": "set%2Fb", "times": 2})
    assert [name for name, _ in list_files(f"{object_store.url}/set", transfer)] == ["a/1", "b/1", "c/1"]
    assert [len(object_store.log(match=f"set%2F{name}%2F")) for name in "abc"] == [1, 3, 1]


def test_upload_is_retried_too(object_store, tmp_path, transfer):
    (tmp_path / "file").write_bytes(BODY)
    object_store.break_on({"kind": "status", "status": 503, "method": "PUT", "times": 2})
    upload(tmp_path / "file", f"{object_store.url}/up", transfer)
    assert read_bytes(f"{object_store.url}/up", transfer) == BODY
    assert transfer.stats.snapshot()["retries"] == 2


def test_file_systems_without_an_event_loop(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    upload(tmp_path / "file", "memory://remote/a/b")
    assert read_bytes("memory://remote/a/b") == BODY
    assert read_range("memory://remote/a/b", 3, 9) == BODY[3:9]
    assert list_files("memory://remote") == [("a/b", len(BODY))]


def test_a_server_that_ignores_ranges_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file"
        assert read_bytes(url) == BODY
        with pytest.raises(DataError, match="byte ranges"):
            read_range(url, 0, 10)
        server.shutdown()


def test_the_wrong_scheme_is_not_retried(monkeypatch, tmp_path):
    """A request by https to an http port. The libraries of S3 and http each wrap the error in their own way."""
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"https://127.0.0.1:{server.server_port}"
        for name, value in {**SECRETS, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "_filesystems", {})  # each is created for one endpoint
        for url in ("s3://bucket/key", f"{endpoint}/key"):
            with pytest.raises(
                DataError, match=r"failed at once: SSLError .*WRONG_VERSION.*; check .* http:// or https"
            ):
                stat(url, Transfer(QUICK))
        server.shutdown()


def test_objects_of_a_known_size(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    upload(tmp_path / "file", "memory://known/a")
    assert read_object("memory://known/a", len(BODY)) == BODY
    for size in (0, len(BODY) - 1, len(BODY) + 1):
        with pytest.raises(DataError, match=rf"known/a .* {len(BODY)} .* {size} "):
            read_object("memory://known/a", size)


def test_urls_that_lost_a_slash():
    assert meant_url("s3:/bucket/x") == meant_url(Path("s3://bucket/x")) == "s3://bucket/x"
    assert not any(map(meant_url, ("s3://b/x", "/s3:/x", "a/b:/c", "file", "memory:x")))


def test_urls_that_cannot_work_say_so_at_once():
    with pytest.raises(DataError, match="chained URL"):
        read_bytes("simplecache::s3://bucket/key")
    with pytest.raises(DataError, match="cannot reach nosuch://bucket/key"):
        read_bytes("nosuch://bucket/key")


def test_a_forked_child_reads(url, transfer):
    """Event loops do not survive a fork: the child creates its own file system."""
    assert read_range(url, 0, 4, transfer) == BODY[:4]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(read_range, (url, 4, 8)).get(timeout=20) == BODY[4:8]


def test_no_secret_in_any_message(object_store, url, capfd, caplog):
    caplog.set_level("INFO")
    port, quick = free_port(), RetryPolicy(deadline=0.3, first_delay=0.05)
    signed = "http://user:passw0rd@127.0.0.1:{}/x?X-Amz-Signature=s1gnature&token=t0ken"
    object_store.break_on({"kind": "status", "status": 403, "code": "SignatureDoesNotMatch", "times": None})
    attempts = [
        (read_range, (url, 0, 4)),
        (stat, ("s3://AKIA:t0ken@bucket/key",)),
        (stat, ("s3://AKIA:t0ken/with/slash@bucket/key",)),
        (stat, (signed.format(port),)),  # nothing listens there
        (read_range, (signed.format(object_store.endpoint.rpartition(":")[2]), 0, 4)),
    ]
    secrets = [*SECRETS.values(), "passw0rd", "s1gnature", "t0ken"]
    for read, arguments in attempts:
        with pytest.raises(DataError) as caught:
            read(*arguments, Transfer(quick))
        text = "".join(traceback.format_exception(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert not [secret for secret in secrets if secret in text], text
    seen = "".join(capfd.readouterr()) + caplog.text
    assert not [secret for secret in secrets if secret in seen]
