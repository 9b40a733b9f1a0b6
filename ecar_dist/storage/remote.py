"""Objects behind fsspec URLs, by the rule of `retries.py`. The only home of fsspec.

fsspec's file systems each retry in their own way, some not at all, and none bounds a body that drips: their retries are
off here. They are made on first use in each process, since their event loops do not survive a fork.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
import fsspec.asyn

from ecar_dist.errors import DataError
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact, scrub
from ecar_dist.storage.retries import ObjectMissing, Transfer, insist, status_of
from ecar_dist.storage.untrusted import UntrustedError, open_plain_file, printable, relative_name

T = TypeVar("T")
_LISTING_THREADS = 16


@dataclass(frozen=True)
class ObjectVersion:
    """What tells an object from the one that replaces it, as far as its store says."""

    size: int | None
    tag: str | None  # ETag, generation or time of change


# what object stores call it, the surest first
_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "Last-Modified")


def is_remote(folder: str | Path) -> bool:
    """True for a URL other than file://."""
    text = str(folder)
    return "://" in text and not text.startswith("file://")


def meant_url(path: str | Path) -> str | None:
    """The URL behind a path like s3:/bucket/set: typed so, or taken for a path on the way. None for other paths."""
    scheme, mark, rest = str(path).partition(":/")
    lost = mark and not rest.startswith("/") and re.fullmatch(r"[a-z][a-z0-9+.\-]+", scheme)
    return f"{scheme}://{rest}" if lost else None


def local_path(folder: str | Path) -> Path:
    """A local path or file:// URL as a path."""
    return Path(str(folder).removeprefix("file://"))


def join(folder: str | Path, name: str) -> str:
    """Where `name` lies in a folder or URL; a query string (a signature) stays behind the path.

    Every path made from a name that stands in a manifest, a table or a listing is made here. Raises DataError for a
    name that leads out of the folder, or that would be something else than a path in a URL.
    """
    try:
        relative_name(name)
        if not is_remote(folder):
            return str(local_path(folder) / name)
        _check_in_url(str(folder), name)
    except UntrustedError as error:
        raise DataError(f"{redact(folder)}: the name {error}; rename it, or make the set again") from None
    base, mark, query = str(folder).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def file_in(folder: str | Path, name: str) -> Path:
    """The file `name` of a local folder. Raises DataError as `join`."""
    return Path(join(local_path(folder), name))


def _check_in_url(url: str, name: str) -> None:
    """Raises UntrustedError for a name that is not the same path once it stands in this URL."""
    if "?" in name:
        raise UntrustedError(f"{printable(repr(name))} has a ?, which begins the query of a URL")
    if url.startswith(("http://", "https://")):  # where a name is also an address: %2e%2e is .. there
        relative_name(unquote(name))
        if "#" in name:
            raise UntrustedError(f"{printable(repr(name))} has a #, which begins the fragment of a URL")


def read_bytes(url: str | Path, transfer: Transfer | None = None, *, limit: int | None = None) -> bytes:
    """A small object or local file, whole. Raises ObjectMissing where there is none, DataError for other failures.

    One of more than `limit` bytes is a failure, as far as its size is known before it is read.
    """
    if not is_remote(url):
        return _read_file(local_path(url), limit)
    size = stat(str(url), transfer).size
    if size is not None:
        _check_size(redact(url), size, limit)
        return read_range(str(url), 0, size, transfer) if size else b""
    return _insist("reading", str(url), transfer, lambda place, timeout: place.call("cat_file", timeout))


def _read_file(path: Path, limit: int | None) -> bytes:
    try:
        with open_plain_file(path, limit) as file:
            return file.read()
    except UntrustedError as error:
        raise DataError(f"cannot read {path}: {error}; restore it") from None
    except FileNotFoundError:
        raise ObjectMissing(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the path and its permissions") from None


def _check_size(where: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise DataError(f"{where} has {size:,} bytes, expected at most {limit:,}; it is not what it should be")


def read_range(url: str, start: int, stop: int, transfer: Transfer | None = None) -> bytes:
    """Bytes [start, stop) of an object, exactly. Raises DataError, one line, when the policy's deadline is over."""

    def attempt(place: _Place, timeout: float) -> bytes:
        body: bytes = place.call("cat_file", timeout, start=start, end=stop)
        if len(body) > stop - start:
            raise DataError(f"{redact(url)}: the server ignores byte ranges; copy the data to a store that has them")
        if len(body) < stop - start:
            raise EOFError(f"a body of {len(body)} bytes where {stop - start} were asked for")
        return body

    transfer = transfer or Transfer()
    body = _insist(f"reading bytes {start}..{stop - 1} of", url, transfer, attempt, stop - start)
    transfer.stats.add(bytes=len(body))
    return body


def read_object(url: str, size: int, transfer: Transfer | None = None) -> bytes:
    """An object that must have `size` bytes, whole, by one request. Raises as `stat` does, and for another size."""
    transfer = transfer or Transfer()

    def attempt(place: _Place, timeout: float) -> bytes:
        body = _up_to(place, size + 1, timeout)  # one byte more shows that it has grown
        if len(body) == size:
            return body
        found = place.call("info", timeout).get("size")  # whose fault is it, the object's or the connection's?
        if found != size:
            raise DataError(f"{redact(url)} has {found} bytes, {size} were expected; restore it, or index it again")
        raise EOFError(f"a body of {len(body)} bytes where {size} were asked for")

    body = _insist("reading", url, transfer, attempt, size)
    transfer.stats.add(bytes=len(body))
    return body


def _up_to(place: _Place, stop: int, timeout: float) -> bytes:
    """Bytes [0, stop) of an object, or what there is of them."""
    try:
        body: bytes = place.call("cat_file", timeout, start=0, end=stop)
    except Exception as error:
        if status_of(error) != 416:
            raise
        return b""  # nothing has no first byte
    return body


def stat(url: str, transfer: Transfer | None = None) -> ObjectVersion:
    """Size and version. Raises ObjectMissing where there is none, DataError for other failures."""
    info = _insist("looking up", url, transfer, lambda place, timeout: place.call("info", timeout))
    tags = (info.get(name) for name in _VERSION_FIELDS)
    return ObjectVersion(info.get("size"), next((str(tag) for tag in tags if tag), None))


def list_files(url: str, transfer: Transfer | None = None) -> list[tuple[str, int]]:
    """(name relative to `url`, bytes) of every object under it, sorted by name.

    Folder by folder, so that a failed page repeats one folder and not the whole listing. Raises as `stat` does, and
    then ends the transfer.
    """
    transfer = transfer or Transfer()
    found: list[tuple[str, int]] = []
    root = _Place(url).path.rstrip("/")
    folders = [root]
    with DaemonPool(_LISTING_THREADS, "list-files") as pool, transfer.stopped_by_errors():
        while folders:
            listings = pool.map(lambda folder: _list_folder(url, folder, transfer), folders)
            entries = [entry for listing in listings for entry in listing]
            folders = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
            files = [entry for entry in entries if entry["type"] != "directory"]
            found += [(entry["name"][len(root) + 1 :], entry["size"]) for entry in files]
    return sorted(found)


def _list_folder(url: str, folder: str, transfer: Transfer) -> list[dict[str, Any]]:
    def attempt(place: _Place, _: float) -> list[dict[str, Any]]:
        # a folder may have any number of pages: its time is the deadline's
        entries = place.call("ls", transfer.policy.deadline, path=folder, detail=True)
        return [entry for entry in entries if entry["name"].rstrip("/") != folder]  # stores list a folder's own marker

    return _insist("listing", url, transfer, attempt)


def upload(path: Path, url: str, transfer: Transfer | None = None) -> None:
    """Send a file. It appears whole on stores that replace objects atomically, as S3 does. Raises as `stat` does."""
    transfer, size = transfer or Transfer(), path.stat().st_size

    def attempt(place: _Place, timeout: float) -> None:
        place.call("put_file", timeout, before=(str(path),))

    _insist("writing", url, transfer, attempt, size)
    transfer.stats.add(bytes=size)


class _Place:
    """A file system and a path in it."""

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0]
        if "::" in protocol:
            raise DataError(f"{redact(url)} is a chained URL; give the plain URL of the data, it is cached anyway")
        if protocol in _OPTIONS and redact(url) != url.partition("?")[0]:
            raise DataError(f"the URL of {redact(url)} holds credentials; set them in the environment or in a profile")
        try:
            kind: Any = fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise DataError(f"cannot reach {redact(url)} ({scrub(str(error))}); install what it needs") from None
        self.path: str = kind._strip_protocol(url)
        self._filesystem = _filesystem(protocol, kind, kind._get_kwargs_from_urls(url))

    def call(self, name: str, timeout: float, *, before: tuple[Any, ...] = (), **options: Any) -> Any:
        """The file system's method on this path; bounded in time wherever the file system is asynchronous."""
        path = options.pop("path", self.path)
        if not self._filesystem.async_impl:
            return getattr(self._filesystem, name)(*before, path, **options)
        method = getattr(self._filesystem, f"_{name}")
        return fsspec.asyn.sync(self._filesystem.loop, method, *before, path, timeout=timeout, **options)


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


def _insist(what: str, url: str, transfer: Transfer | None, attempt: Callable[[_Place, float], T], size: int = 0) -> T:
    return insist(
        what,
        url,
        transfer or Transfer(),
        lambda timeout: attempt(_Place(url), timeout),
        size=size,
        renew=_forget_filesystems,
    )


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
    """This process's own instance: never one that another library made with its own retries."""
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
    """The next request makes them again and so reads the credentials again."""
    with _filesystems_lock:
        _filesystems.clear()
