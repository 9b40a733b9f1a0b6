"""Removed objects and unfinished uploads, on a real S3 server."""

import fsspec
import pytest

from ecar_dist.errors import DataError
from ecar_dist.storage.remote import abort_uploads, list_files, remove
from ecar_dist.storage.retries import Transfer
from tests.data.object_store import QUICK


def test_an_object_is_removed_and_one_that_is_gone_is_not_an_error(object_store):
    object_store.put("runs/a", b"1")
    object_store.put("runs/b", b"2")
    object_store.break_on({"kind": "status", "status": 503, "method": "DELETE", "times": 2})
    remove(f"{object_store.url}/runs/a", Transfer(QUICK))
    remove(f"{object_store.url}/runs/a", Transfer(QUICK))
    assert list_files(object_store.url, Transfer(QUICK)) == [("runs/b", 1)]
    object_store.break_on({"kind": "status", "status": 403, "method": "DELETE"})
    with pytest.raises(DataError, match=r"removing .*/runs/b failed at once: HTTP 403"):
        remove(f"{object_store.url}/runs/b", Transfer(QUICK))


def test_unfinished_uploads_under_a_prefix_are_ended_and_no_others(object_store):
    bucket = object_store.url.removeprefix("s3://")
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    for key in ("runs/tiny/x", "runs/tinyer/x"):
        s3.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert abort_uploads(f"{object_store.url}/runs/tiny", Transfer(QUICK)) == 1
    assert abort_uploads(f"{object_store.url}/runs/tiny", Transfer(QUICK)) == 0
    (left,) = s3.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert left["Key"] == "runs/tinyer/x"


def test_other_stores_end_theirs_by_themselves():
    assert abort_uploads("memory://somewhere") == 0
