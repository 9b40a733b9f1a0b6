"""One retry rule for all object stores: what is retried, how often, and which error the user gets in the end.

Transport errors, timeouts, short bodies and the statuses 408, 429 and 5xx are retried with growing pauses until a
deadline. Every other status is final, and so is a server that cannot be trusted or does not speak TLS.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ecar_dist.errors import DataError
from ecar_dist.storage.redaction import redact, scrub

T = TypeVar("T")


class ObjectMissing(DataError):
    """The store answered that there is no such object."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long one operation is retried. A request times out after `request_seconds` plus its size / `slowest`."""

    deadline: float = 600.0  # seconds for all attempts of one operation
    request_seconds: float = 30.0
    slowest: int = 1 << 18  # bytes per second; a body that arrives more slowly is requested again
    first_delay: float = 0.2  # seconds; doubles with each attempt
    longest_delay: float = 20.0

    def delay(self, attempt: int) -> float:
        """The pause after failed attempt 1, 2, ...; with jitter, so that not all ranks retry at the same time."""
        longest = min(self.longest_delay, self.first_delay * 2.0 ** min(attempt - 1, 30))
        return longest * _JITTER.uniform(0.5, 1.0)

    def request_timeout(self, size: int) -> float:
        return self.request_seconds + size / self.slowest


_JITTER = random.SystemRandom()  # the global generator belongs to the user, and forks share its state


class TransferStats:
    """Counters of traffic, safe to use from many threads."""

    FIELDS = ("bytes", "requests", "retries", "refetches", "seconds")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys(self.FIELDS, 0)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def snapshot(self) -> dict[str, float]:
        """`bytes` moved, `requests`, `retries` among them, shard `refetches`, `seconds` in requests (all threads)."""
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True)
class Transfer:
    """What the requests of one reader share: their policy, their counters, and the event that ends them early."""

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stats: TransferStats = field(default_factory=TransferStats)
    stopping: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """If an error or Ctrl-C ends the block, end the requests of other threads, which would retry for minutes."""
        try:
            yield
        except BaseException:
            self.stopping.set()
            raise


@dataclass(frozen=True)
class _Failure:
    """What is known about one failed attempt."""

    reason: str
    status: int | None  # HTTP status
    final: bool  # another attempt would not help
    missing: bool
    expired: bool  # the credentials; or there were none when this process first looked
    timed_out: bool
    tls: bool  # an untrusted server, or no common protocol; not a broken connection

    @staticmethod
    def of(error: BaseException) -> _Failure:
        status = status_of(error)
        code = _s3_code(error)
        tls = _tls_fault(error)
        # fsspec's HTTP file system turns any failure into FileNotFoundError and keeps the original error as its cause
        root = tls or list(_chain(error))[-1]

        # what it means for further attempts
        if status is None:
            final = tls is not None or isinstance(root, _FINAL_TYPES) or type(root).__name__ in _FINAL_NAMES
        else:
            final = 400 <= status < 500 and status not in (408, 429)
        missing = status == 404 or (final and status is None and isinstance(root, FileNotFoundError))
        timed_out = status is None and isinstance(error, TimeoutError)

        # how to describe it
        name = code if code and not code.isdigit() else type(root).__name__
        words = scrub(" ".join(str(tls or error).split()))[:_MAX_WORDS]
        reason = (f"HTTP {status} {name}" if status else name) + (f" ({words})" if words else "")
        if missing and status is None:
            reason = "no such object"
        elif timed_out:
            reason = "no complete response in time"
        outdated = code in _EXPIRED or type(root).__name__ in _NO_CREDENTIALS
        return _Failure(reason, status, final, missing, outdated, timed_out, tls is not None)

    @property
    def fix(self) -> str:
        if self.missing:
            return "check the URL"
        if self.status in (400, 401, 403) or "Credentials" in self.reason:
            return "check the credentials and the permissions of this user"
        if self.tls:
            return "check the endpoint's http:// or https://, and its certificate"
        if self.final:
            return "check the URL and the settings of the store"
        return "check the network and the store, then start again"

    def as_error(self, what: str, attempts: int, elapsed: float) -> DataError:
        """what: the operation, e.g. "reading s3://bucket/key"."""
        tried = "at once" if attempts == 1 else f"after {attempts} attempts in {elapsed:.0f} s"
        kind = ObjectMissing if self.missing else DataError
        return kind(f"{what} failed {tried}: {self.reason}; {self.fix}")


def with_retries(
    what: str,
    url: str,
    transfer: Transfer,
    attempt: Callable[[float], T],
    *,
    size: int = 0,
    renew: Callable[[], None] = lambda: None,
) -> T:
    """Call `attempt(timeout)` until it succeeds, fails for good, or the deadline has passed.

    what: the action, for messages, e.g. "reading". size: bytes that a request moves, for its timeout. renew: called
    once when credentials have expired or are missing, before one more attempt.

    Raises ObjectMissing for 404 and a one-line DataError for every other failure. A DataError of the attempt is final.
    """
    what = f"{what} {redact(url)}"
    policy = transfer.policy
    began = time.monotonic()
    attempts = 0
    renewed = False
    failure: _Failure | None = None

    while not transfer.stopping.is_set():
        # one attempt, within the remaining time
        attempts += 1
        asked = time.monotonic()
        left = policy.deadline - (asked - began)
        try:
            return attempt(max(0.001, min(policy.request_timeout(size), left)))
        except DataError:
            raise
        except Exception as error:
            latest = _Failure.of(error)
            # a timeout that our deadline cut short gives no reason: keep that of the attempt before it
            if failure is None or not latest.timed_out or left > policy.request_timeout(size):
                failure = latest
        finally:
            transfer.stats.add(requests=1, seconds=time.monotonic() - asked)

        # Give up? Outside the handler: the library's exception may contain secrets, so it is not chained to ours.
        pause = policy.delay(attempts)
        elapsed = time.monotonic() - began
        again = not failure.final or (failure.expired and not renewed)
        if not again or elapsed + pause > policy.deadline:
            raise failure.as_error(what, attempts, elapsed)

        # the next attempt
        if failure.expired:
            renewed = True
            renew()
        transfer.stats.add(retries=1)
        _NOTICES.say(f"{what}: {failure.reason}", attempts, elapsed, policy.deadline)
        transfer.stopping.wait(pause)
    raise DataError(f"{what} was stopped; run the same command again to continue")


class _Notices:
    """An occasional line on stderr while a problem lasts: a silent wait of minutes looks like a hang."""

    EVERY = 15.0  # seconds, for the whole process

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -math.inf

    def say(self, trouble: str, attempts: int, elapsed: float, deadline: float) -> None:
        with self._lock:
            now = time.monotonic()
            if elapsed < self.EVERY or now - self._last < self.EVERY:
                return
            self._last = now
        _log.warning("%s; %d attempts in %.0f s, giving up at %.0f s", trouble, attempts, elapsed, deadline)


_NOTICES = _Notices()
_log = logging.getLogger(__name__)


_MAX_WORDS = 160  # characters of another library's message
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}  # a client keeps the first result of its search
_FINAL_TYPES = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    NotImplementedError,
)
_FINAL_NAMES = {  # botocore's
    *_NO_CREDENTIALS,
    "NoRegionError",
    "ProfileNotFound",
    "ParamValidationError",
}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status anywhere in the chain: botocore, aiohttp, gcsfs and azure keep it in different places."""
    for link in _chain(error):
        if any(kind.__name__ == "HttpProcessingError" for kind in type(link).__mro__):
            continue  # aiohttp raises this for a broken body: its code 400 is not from the server
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status", "status_code", "code"):
            if isinstance(value := getattr(link, name, None), int) and 400 <= value < 600:
                return value
    return None


def _tls_fault(error: BaseException) -> ssl.SSLError | None:
    """The error that makes TLS to this server impossible, wherever the libraries keep it; None if there is none."""
    link: BaseException | None = error
    root: ssl.SSLError | None = None  # the innermost one: aiohttp's own SSL error wraps any other
    while link is not None:
        root = link if isinstance(link, ssl.SSLError) else root
        link = link.__cause__ or link.__context__
    broken = isinstance(root, _BROKEN_TLS) or getattr(root, "reason", None) in _BROKEN_RECORDS
    return None if broken else root


_BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # like any broken connection
_BROKEN_RECORDS = {"DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "UNEXPECTED_EOF_WHILE_READING"}


def _s3_code(error: BaseException) -> str | None:
    """S3's error code."""
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((answer.get("Error", {}).get("Code") for answer in responses if isinstance(answer, dict)), None)
