"""A real S3 protocol server in its own process behind the proxy of fault_proxy.py, as pytest fixtures.

`object_store` is an empty bucket for one test; AWS_ENDPOINT_URL points to the proxy while the test runs.
"""

import atexit
import dataclasses
import functools
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecar_dist.storage.remote import stat
from ecar_dist.storage.retries import RetryPolicy, Transfer
from tests.conftest import free_port
from tests.data.fault_proxy import CONTROL

# time-outs are long enough for a busy machine; IMPATIENT is for faults that only a time-out ends
QUICK = RetryPolicy(deadline=30.0, request_seconds=10.0, slowest=1 << 20, first_delay=0.01, longest_delay=0.1)
IMPATIENT = dataclasses.replace(QUICK, request_seconds=1.0)
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETNAMEXX",
    "AWS_SECRET_ACCESS_KEY": "verysecretvalue0123456789",
    "AWS_SESSION_TOKEN": "sessiontokenvalue0123456789",
}
# the server wants to be asked by somebody, and takes any signature
SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
HEADERS = {"Content-Type": "application/octet-stream", "Authorization": SIGNED}


@dataclass
class ObjectStore:
    """`url` is s3://bucket; `endpoint` the proxy; `server` the S3 server itself."""

    url: str
    endpoint: str
    server: str

    def break_on(self, *faults: dict) -> None:
        """Set the faults and empty the log."""
        call("POST", self.endpoint + CONTROL, json.dumps(faults).encode())

    def log(self, method: str = "GET", match: str = "") -> list[dict]:
        entries = json.loads(call("GET", self.endpoint + CONTROL))
        return [entry for entry in entries if entry["method"] == method and match in entry["path"]]

    def put(self, name: str, body: bytes) -> None:
        """Around the proxy."""
        call("PUT", f"{self.server}/{self.url.removeprefix('s3://')}/{name}", body)

    def put_folder(self, folder: Path, prefix: str = "") -> str:
        """Every file of a folder; the folder's URL."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{prefix}".rstrip("/")


def call(method: str, url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, HEADERS, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


@pytest.fixture(scope="session")
def s3_server():
    """URLs of the server and of the proxy before it."""
    return start_servers()


@functools.cache  # one pair for a whole test process: connections are made once, and know one endpoint
def start_servers() -> tuple[str, str]:
    port = free_port()
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(moto, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    proxy_command = [sys.executable, str(Path(__file__).with_name("fault_proxy.py")), str(port)]
    proxy = subprocess.Popen(proxy_command, stdout=subprocess.PIPE, text=True)
    atexit.register(proxy.kill)
    wait_for(f"http://127.0.0.1:{port}/moto-api/")
    return f"http://127.0.0.1:{port}", f"http://127.0.0.1:{int(proxy.stdout.readline())}"


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            return call("GET", url)
        except urllib.error.HTTPError:
            return None
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture
def object_store(s3_server, monkeypatch, tmp_path_factory):
    server, endpoint = s3_server
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ECAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    bucket = f"bucket-{uuid.uuid4().hex}"
    call("PUT", f"{server}/{bucket}")
    store = ObjectStore(f"s3://{bucket}", endpoint, server)
    stat(store.url, Transfer(QUICK))  # connects: what the first request of a process takes long for
    store.break_on()
    return store
