"""A bucket on a real S3 server, with little patience."""

import pytest

from ecar_dist.runtime.checkpoint import bucket as checkpoint_bucket
from tests.data.object_store import QUICK, object_store, s3_server

__all__ = ["object_store", "s3_server"]


@pytest.fixture
def bucket(object_store, monkeypatch):
    monkeypatch.setattr(checkpoint_bucket, "RetryPolicy", lambda: QUICK)
    return object_store
