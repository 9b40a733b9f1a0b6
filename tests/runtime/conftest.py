"""A bucket on a real S3 server, with few and short retries; and a real disk that fills up soon."""

import subprocess

import pytest

from ecar_dist.runtime.checkpoint import bucket as checkpoint_bucket
from tests.data.object_store import QUICK, object_store, s3_server

__all__ = ["object_store", "s3_server"]


@pytest.fixture
def bucket(object_store, monkeypatch):
    monkeypatch.setattr(checkpoint_bucket, "RetryPolicy", lambda: QUICK)
    return object_store


@pytest.fixture
def small_disk(request, tmp_path):
    """A folder on its own disk. `request.param`: the size of the disk, in mount's notation."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NOT RUN, no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    # lazily: a run may still have files open
    subprocess.run(["umount", "-l", str(disk)], check=True)
