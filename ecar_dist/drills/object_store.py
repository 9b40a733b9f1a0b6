"""An S3 server (moto) in its own process, behind the proxy of fault_proxy.py in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.drills.fault_proxy import CONTROL
from ecar_dist.drills.processes import free_port

START_SECONDS = 30.0
# The server requires a signature, and accepts any.
SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
HEADERS = {"Content-Type": "application/octet-stream", "Authorization": SIGNED}


@dataclass(frozen=True)
class ObjectStore:
    """A bucket. `url` is s3://bucket, `endpoint` the URL of the proxy, `server` that of the S3 server itself."""

    url: str
    endpoint: str
    server: str

    def break_on(self, *faults: dict[str, Any]) -> None:
        """Set the faults of the proxy and empty its log."""
        call("POST", self.endpoint + CONTROL, json.dumps(faults).encode())

    def log(self, method: str = "GET", match: str = "") -> list[dict[str, Any]]:
        entries = json.loads(call("GET", self.endpoint + CONTROL))
        return [entry for entry in entries if entry["method"] == method and match in entry["path"]]

    def put(self, name: str, body: bytes) -> None:
        """Write an object, bypassing the proxy."""
        call("PUT", f"{self.server}/{self.url.removeprefix('s3://')}/{name}", body)

    def put_folder(self, folder: Path, prefix: str = "") -> str:
        """Write every file of a folder; returns the folder's URL."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{prefix}".rstrip("/")


class StoreServers:
    """The two processes; `server` and `endpoint` are their URLs. As a context manager, it ends them on exit.

    proxy: arguments for Python that start the proxy.
    """

    def __init__(self, proxy: Sequence[str] = ("-m", "ecar_dist.drills.fault_proxy")) -> None:
        port = free_port()
        self._processes = [_start(subprocess.DEVNULL, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))]
        try:
            started = _start(subprocess.PIPE, *proxy, str(port))
            self._processes.append(started)
            assert started.stdout is not None
            self.server, self.endpoint = (f"http://127.0.0.1:{at}" for at in (port, int(started.stdout.readline())))
            _wait_for(f"{self.server}/moto-api/")
        except BaseException:
            self.close()
            raise

    def new_bucket(self) -> ObjectStore:
        bucket = f"bucket-{uuid.uuid4().hex}"
        call("PUT", f"{self.server}/{bucket}")
        return ObjectStore(f"s3://{bucket}", self.endpoint, self.server)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def __enter__(self) -> StoreServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def call(method: str, url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, HEADERS, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def _start(stdout: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, *words]
    # Its own session: Ctrl-C reaches only the drill, which then ends these two processes.
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, text=True, start_new_session=True)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            call("GET", url)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
