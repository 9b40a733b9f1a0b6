"""The S3 server of the drills, as pytest fixtures.

`object_store` is an empty bucket for one test; AWS_ENDPOINT_URL points to the proxy while the test runs.
"""

import atexit
import dataclasses
import functools
from pathlib import Path

import pytest

from ecar_dist.drills.object_store import StoreServers
from ecar_dist.storage.remote import stat
from ecar_dist.storage.retries import RetryPolicy, Transfer

# time-outs are long enough for a busy machine; IMPATIENT is for faults that only a time-out ends
QUICK = RetryPolicy(deadline=30.0, request_seconds=10.0, slowest=1 << 20, first_delay=0.01, longest_delay=0.1)
IMPATIENT = dataclasses.replace(QUICK, request_seconds=3.0)
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETNAMEXX",
    "AWS_SECRET_ACCESS_KEY": "verysecretvalue0123456789",
    "AWS_SESSION_TOKEN": "sessiontokenvalue0123456789",
}


@pytest.fixture(scope="session")
def s3_server():
    return start_servers()


@functools.cache  # one pair for a test process: connections are made once, and know only one endpoint
def start_servers() -> StoreServers:
    servers = StoreServers(proxy=[str(Path(__file__).with_name("fault_proxy.py"))])
    atexit.register(servers.close)
    return servers


@pytest.fixture
def object_store(s3_server, monkeypatch, tmp_path_factory):
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ECAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    store = s3_server.new_bucket()
    stat(store.url, Transfer(QUICK))  # connects, which makes the first request of a process slow
    store.break_on()
    return store
