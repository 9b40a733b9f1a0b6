"""Objects behind fsspec URLs, with the retries of `retries.py`. The only module that imports fsspec.

Each fsspec file system retries in its own way, some not at all, and none limits the time of a slow body. So their
retries are disabled here. They are created on first use in each process, because their event loops do not survive a
fork.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
import fsspec.asyn

from ecar_dist.errors import DataError, reason_of
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact, scrub
from ecar_dist.storage.retries import ObjectMissing, Transfer, status_of, with_retries
from ecar_dist.storage.untrusted import UntrustedError, open_plain_file, printable, relative_name

T = TypeVar("T")
_PARALLEL_REQUESTS = 16
_BULK = 1000  # keys in one request, S3's limit


@dataclass(frozen=True)
class ObjectVersion:
    """Distinguishes an object from one that replaces it, as far as the store reports it."""

    size: int | None
    tag: str | None  # ETag, generation or modification time


# the names of the tag in object stores, most reliable first
_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "Last-Modified")


def is_remote(folder: str | Path) -> bool:
    """True for a URL other than file://."""
    text = str(folder)
    return "://" in text and not text.startswith("file://")


def meant_url(path: str | Path) -> str | None:
    """The URL that a path like s3:/bucket/set was meant to be, e.g. because `Path` removed a slash; else None."""
    scheme, mark, rest = str(path).partition(":/")
    lost = mark and not rest.startswith("/") and re.fullmatch(r"[a-z][a-z0-9+.\-]+", scheme)
    return f"{scheme}://{rest}" if lost else None


def local_path(folder: str | Path) -> Path:
    """A local path or file:// URL as a path."""
    return Path(str(folder).removeprefix("file://"))


def join(folder: str | Path, name: str) -> str:
    """The path or URL of `name` in a folder or URL; a query string (a signature) stays after the path.

    Every path from a name in a manifest, a table or a listing is built here. Raises DataError for a name that leads out
    of the folder, or that would not be a path in a URL.
    """
    try:
        relative_name(name)
        if not is_remote(folder):
            return str(local_path(folder) / name)
        _check_in_url(str(folder), name)
    except UntrustedError as error:
        raise DataError(f"{redact(folder)}: the name {error}; rename it, or create the set again") from None
    base, mark, query = str(folder).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def file_in(folder: str | Path, name: str) -> Path:
    """The file `name` of a local folder. Raises DataError as `join` does."""
    return Path(join(local_path(folder), name))


def _check_in_url(url: str, name: str) -> None:
    """Raises UntrustedError for a name that becomes a different path as part of this URL."""
    if "?" in name:
        raise UntrustedError(f"{printable(repr(name))} has a ?, which begins the query of a URL")
    if url.startswith(("http://", "https://")):  # servers decode a name: %2e%2e is .. there
        relative_name(unquote(name))
        if "#" in name:
            raise UntrustedError(f"{printable(repr(name))} has a #, which begins the fragment of a URL")


def read_bytes(url: str | Path, transfer: Transfer | None = None, *, limit: int | None = None) -> bytes:
    """All bytes of a small object or local file. Raises ObjectMissing if there is none, DataError for other failures.

    More than `limit` bytes are a failure if the size is known before the object is read.
    """
    if not is_remote(url):
        return _read_file(local_path(url), limit)
    size = stat(str(url), transfer).size
    if size is not None:
        _check_size(redact(url), size, limit)
        return read_range(str(url), 0, size, transfer) if size else b""
    return _request("reading", str(url), transfer, lambda path, timeout: path.call("cat_file", timeout))


def _read_file(path: Path, limit: int | None) -> bytes:
    try:
        with open_plain_file(path, limit) as file:
            return file.read()
    except UntrustedError as error:
        raise DataError(f"cannot read {path}: {error}; restore it") from None
    except FileNotFoundError:
        raise ObjectMissing(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise DataError(f"cannot read {path} ({reason_of(error)}); check the path and its permissions") from None


def _check_size(where: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise DataError(f"{where} has {size:,} bytes, expected at most {limit:,}; restore it")


def read_range(url: str, start: int, stop: int, transfer: Transfer | None = None) -> bytes:
    """Exactly bytes [start, stop) of an object. Raises a one-line DataError at the deadline of the policy."""

    def attempt(path: _RemotePath, timeout: float) -> bytes:
        body: bytes = path.call("cat_file", timeout, start=start, end=stop)
        if len(body) > stop - start:
            raise DataError(f"{redact(url)}: the server ignores byte ranges; copy the data to one that supports them")
        if len(body) < stop - start:
            raise EOFError(f"a body of {len(body)} bytes instead of {stop - start}")
        return body

    transfer = transfer or Transfer()
    body = _request(f"reading bytes {start}..{stop - 1} of", url, transfer, attempt, stop - start)
    transfer.stats.add(bytes=len(body))
    return body


def read_object(url: str, size: int, transfer: Transfer | None = None) -> bytes:
    """All bytes of an object that must have `size` bytes, in one request. Raises as `stat`, and for a wrong size."""
    transfer = transfer or Transfer()

    def attempt(path: _RemotePath, timeout: float) -> bytes:
        body = _up_to(path, size + 1, timeout)  # one more byte would show that it has grown
        if len(body) == size:
            return body
        found = path.call("info", timeout).get("size")  # is it the object or the connection?
        if found != size:
            raise DataError(f"{redact(url)} has {found} bytes, {size} were expected; restore it, or index it again")
        raise EOFError(f"a body of {len(body)} bytes instead of {size}")

    body = _request("reading", url, transfer, attempt, size)
    transfer.stats.add(bytes=len(body))
    return body


def _up_to(path: _RemotePath, stop: int, timeout: float) -> bytes:
    """Bytes [0, stop) of an object, or fewer if the object is shorter."""
    try:
        body: bytes = path.call("cat_file", timeout, start=0, end=stop)
    except Exception as error:
        if status_of(error) != 416:
            raise
        return b""  # an empty object has no first byte
    return body


def stat(url: str, transfer: Transfer | None = None) -> ObjectVersion:
    """Size and version. Raises ObjectMissing if there is no such object, DataError for other failures."""
    info = _request("looking up", url, transfer, lambda path, timeout: path.call("info", timeout))
    tags = (info.get(name) for name in _VERSION_FIELDS)
    return ObjectVersion(info.get("size"), next((str(tag) for tag in tags if tag), None))


def list_files(url: str, transfer: Transfer | None = None) -> list[tuple[str, int]]:
    """(name relative to `url`, bytes) of every object under it, sorted by name.

    Lists folder by folder, so that a failed page repeats one folder instead of the entire listing. Raises as `stat`
    does, and then ends the transfer.
    """
    transfer = transfer or Transfer()
    found: list[tuple[str, int]] = []
    root = _RemotePath(url).path.rstrip("/")
    folders = [root]
    with DaemonPool(_PARALLEL_REQUESTS, "list-files") as pool, transfer.stopped_by_errors():
        while folders:
            listings = pool.map(lambda folder: _list_folder(url, folder, transfer), folders)
            entries = [entry for listing in listings for entry in listing]
            folders = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
            files = [entry for entry in entries if entry["type"] != "directory"]
            found += [(entry["name"][len(root) + 1 :], entry["size"]) for entry in files]
    return sorted(found)


def _list_folder(url: str, folder: str, transfer: Transfer) -> list[dict[str, Any]]:
    def attempt(path: _RemotePath, _: float) -> list[dict[str, Any]]:
        # a folder may have any number of pages, so its timeout is the deadline
        entries = path.call("ls", transfer.policy.deadline, path=folder, detail=True)
        return [entry for entry in entries if entry["name"].rstrip("/") != folder]  # stores list a folder's own marker

    return _request("listing", url, transfer, attempt)


def upload(file: Path, url: str, transfer: Transfer | None = None) -> None:
    """Upload a file. On stores with atomic replacement, such as S3, no partial file appears. Raises as `stat` does."""
    transfer = transfer or Transfer()
    size = file.stat().st_size

    def attempt(path: _RemotePath, timeout: float) -> None:
        path.call("put_file", timeout, before=(str(file),))

    _request("writing", url, transfer, attempt, size)
    transfer.stats.add(bytes=size)


class _RemotePath:
    """A file system and a path in it."""

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0]
        if "::" in protocol:
            raise DataError(f"{redact(url)} is a chained URL; give the plain URL of the data, it is cached anyway")
        if protocol in _OPTIONS and redact(url) != url.partition("?")[0]:
            raise DataError(f"the URL of {redact(url)} has credentials; set them in the environment or in a profile")
        try:
            kind: Any = fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise DataError(f"cannot reach {redact(url)} ({scrub(str(error))}); install what it needs") from None
        self.path: str = kind._strip_protocol(url)
        self._filesystem = _filesystem(protocol, kind, kind._get_kwargs_from_urls(url))

    def call(self, name: str, timeout: float, *, before: tuple[Any, ...] = (), **options: Any) -> Any:
        """Call a method of the file system on this path, with a timeout if the file system is asynchronous."""
        path = options.pop("path", self.path)
        if not self._filesystem.async_impl:
            return getattr(self._filesystem, name)(*before, path, **options)
        method = getattr(self._filesystem, f"_{name}")
        return fsspec.asyn.sync(self._filesystem.loop, method, *before, path, timeout=timeout, **options)


def remove(url: str, transfer: Transfer | None = None) -> None:
    """Remove one object if it exists. Raises a one-line DataError if the store refuses."""
    try:
        _request("removing", url, transfer, lambda path, timeout: path.call("rm_file", timeout))
    except ObjectMissing:
        pass


def remove_many(urls: Sequence[str], transfer: Transfer) -> None:
    """Remove those objects of one bucket that exist: a thousand per request on S3, in parallel on other stores.

    S3 may leave some without an error. Raises a one-line DataError if the store refuses.
    """
    if not urls:
        return
    if not hasattr(_RemotePath(urls[0])._filesystem, "_bulk_delete"):
        with DaemonPool(_PARALLEL_REQUESTS, "remove") as pool, transfer.stopped_by_errors():
            list(pool.map(lambda url: remove(url, transfer), urls))
        return
    for first in range(0, len(urls), _BULK):
        paths = [_RemotePath(url).path for url in urls[first : first + _BULK]]
        what = f"removing {len(paths)} objects like"
        _request(what, urls[first], transfer, partial(_bulk_delete, paths))


def _bulk_delete(paths: list[str], path: _RemotePath, timeout: float) -> None:
    path.call("bulk_delete", timeout, path=paths)


def abort_uploads(url: str, transfer: Transfer | None = None) -> int:
    """Abort the multipart uploads under `url` that a killed or timed-out writer left; returns their number.

    Only on S3: other stores abort them automatically. Call it only while nobody is writing. Raises as `remove` does.
    """
    return _request("ending unfinished uploads under", url, transfer, _abort_each)


def _abort_each(path: _RemotePath, timeout: float) -> int:
    if not hasattr(path._filesystem, "_call_s3"):
        return 0
    bucket, _, prefix = path.path.partition("/")

    def ask(method: str, **what: str) -> dict[str, Any]:
        # `call_s3` takes a dict of further arguments in the position where other methods take the path
        return path.call("call_s3", timeout, before=(method,), path={}, Bucket=bucket, **what)

    uploads = ask("list_multipart_uploads", Prefix=f"{prefix.rstrip('/')}/").get("Uploads", [])
    for upload in uploads:  # a page of a thousand; the next call aborts the rest
        ask("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)


def _request(
    what: str, url: str, transfer: Transfer | None, attempt: Callable[[_RemotePath, float], T], size: int = 0
) -> T:
    """`with_retries` of `attempt(path, timeout)`."""

    def on_path(timeout: float) -> T:
        return attempt(_RemotePath(url), timeout)

    return with_retries(what, url, transfer or Transfer(), on_path, size=size, renew=_forget_filesystems)


_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 64,
    }
}
_OPTIONS = {"s3": _S3_OPTIONS, "s3a": _S3_OPTIONS}
_filesystems: dict[Any, Any] = {}
_filesystems_lock = threading.Lock()


def _filesystem(protocol: str, kind: Any, options: dict[str, Any]) -> Any:
    """The instance of this process: never one that another library created with its own retries."""
    key = (os.getpid(), protocol, repr(sorted(options.items())))
    with _filesystems_lock:
        if key not in _filesystems:
            own = {"skip_instance_cache": True, "use_listings_cache": False}
            made = kind(**{**_OPTIONS.get(protocol, {}), **options, **own})
            if hasattr(made, "retries"):
                made.retries = 1
            _filesystems[key] = made
        return _filesystems[key]


def _forget_filesystems() -> None:
    """The next request creates new ones, which read the credentials again."""
    with _filesystems_lock:
        _filesystems.clear()
