"""Take objects away again, and the parts of uploads that never ended: they cost money and no listing shows them."""

from __future__ import annotations

from typing import Any

from ecar_dist.storage.remote import _insist, _Place
from ecar_dist.storage.retries import ObjectMissing, Transfer


def remove(url: str, transfer: Transfer | None = None) -> None:
    """One object; that it is gone already is no error. Raises DataError, one line, where the store does not do it."""
    try:
        _insist("removing", url, transfer, lambda place, timeout: place.call("rm_file", timeout))
    except ObjectMissing:
        pass


def abort_uploads(url: str, transfer: Transfer | None = None) -> int:
    """End the multipart uploads under `url` that a killed or timed-out writer left; their number.

    Where the store is S3's; others end them by themselves. Call it only where nobody is writing. Raises as `remove`.
    """
    return _insist("ending unfinished uploads under", url, transfer, _abort_each)


def _abort_each(place: _Place, timeout: float) -> int:
    if not hasattr(place._filesystem, "_call_s3"):
        return 0
    bucket, _, prefix = place.path.partition("/")

    def ask(method: str, **what: str) -> dict[str, Any]:
        # after the method's name comes a dict of further arguments, where other calls have the path
        return place.call("call_s3", timeout, before=(method,), path={}, Bucket=bucket, **what)

    uploads = ask("list_multipart_uploads", Prefix=f"{prefix.rstrip('/')}/").get("Uploads", [])
    for upload in uploads:  # a page of a thousand; the next call ends the rest
        ask("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)
