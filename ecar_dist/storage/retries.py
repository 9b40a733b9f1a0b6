"""One rule of retrying for all object stores: what is tried again, how often, and what the user is told in the end.

Transport errors, time-outs, short bodies and the statuses 408, 429 and 5xx are tried again with growing pauses until a
deadline. Every other status is final at once, and so is a server that cannot be trusted or does not speak TLS.
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
    """How long one operation insists. A request is given up after `request_seconds` plus its size at `slowest`."""

    deadline: float = 600.0  # seconds for one operation with all its attempts
    request_seconds: float = 30.0
    slowest: int = 1 << 18  # bytes a second; a body that drips below this is asked for again
    first_delay: float = 0.2  # seconds; doubles with each attempt
    longest_delay: float = 20.0

    def delay(self, attempt: int) -> float:
        """The pause after failed attempt 1, 2, ..., with jitter so that ranks that failed together come back apart."""
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
        """What ends the block early, Ctrl-C too, ends the requests of other threads: they insist for minutes."""
        try:
            yield
        except BaseException:
            self.stopping.set()
            raise


@dataclass(frozen=True)
class _Verdict:
    """What one failed attempt says."""

    reason: str
    status: int | None
    final: bool
    missing: bool
    expired: bool
    timed_out: bool
    tls: bool  # no trust, or no common language; not a connection that broke

    @staticmethod
    def of(error: BaseException) -> _Verdict:
        status, code, tls = status_of(error), _code(error), _tls_fault(error)
        # http's file system turns any failure into FileNotFoundError and keeps the true one as its cause
        root = tls or list(_chain(error))[-1]
        if status is None:
            final = tls is not None or isinstance(root, _FINAL_TYPES) or type(root).__name__ in _FINAL_NAMES
        else:
            final = 400 <= status < 500 and status not in (408, 429)
        missing = status == 404 or (final and status is None and isinstance(root, FileNotFoundError))
        name = code if code and not code.isdigit() else type(root).__name__
        words = scrub(" ".join(str(tls or error).split()))[:160]
        reason = (f"HTTP {status} {name}" if status else name) + (f" ({words})" if words else "")
        timed_out = status is None and isinstance(error, TimeoutError)
        if missing and status is None:
            reason = "no such object"
        elif timed_out:
            reason = "no whole answer in time"
        return _Verdict(reason, status, final, missing, code in _EXPIRED, timed_out, tls is not None)

    @property
    def fix(self) -> str:
        if self.missing:
            return "check the URL"
        if self.status in (400, 401, 403) or "Credentials" in self.reason:
            return "check the credentials and the rights of this user"
        if self.tls:
            return "check the endpoint's http:// or https://, and its certificate"
        if self.final:
            return "check the URL and the settings of the store"
        return "check the network and the store, then start again"


def insist(
    what: str,
    url: str,
    transfer: Transfer,
    attempt: Callable[[float], T],
    *,
    size: int = 0,
    renew: Callable[[], None] = lambda: None,
) -> T:
    """Run `attempt(timeout)` until it succeeds, fails for good, or the deadline is over.

    `renew` is called once where credentials have expired, before one more attempt. Raises ObjectMissing for 404 and
    DataError, one line, for every other end. A DataError of the attempt is final.
    """
    policy, stats = transfer.policy, transfer.stats
    began, attempts, renewed = time.monotonic(), 0, False
    verdict: _Verdict | None = None
    while not transfer.stopping.is_set():
        attempts += 1
        left = policy.deadline - (time.monotonic() - began)
        asked = time.monotonic()
        try:
            return attempt(max(0.001, min(policy.request_timeout(size), left)))
        except DataError:
            raise
        except Exception as error:
            now = _Verdict.of(error)
            # the attempt that our deadline cut short says nothing: the one before does
            if verdict is None or not now.timed_out or left > policy.request_timeout(size):
                verdict = now
        finally:
            stats.add(requests=1, seconds=time.monotonic() - asked)
        # what follows is outside the handler: the library's exception may hold secrets and is not chained to ours
        pause, elapsed = policy.delay(attempts), time.monotonic() - began
        again = not verdict.final or (verdict.expired and not renewed)
        if not again or elapsed + pause > policy.deadline:
            raise _failure(f"{what} {redact(url)}", verdict, attempts, elapsed)
        if verdict.expired:
            renewed = True
            renew()
        stats.add(retries=1)
        _NOTICES.say(f"{what} {redact(url)}: {verdict.reason}", attempts, elapsed, policy.deadline)
        transfer.stopping.wait(pause)
    raise DataError(f"{what} {redact(url)} was stopped; start again to go on")


class _Notices:
    """Now and then a line on stderr, from the first long trouble on: a silent wait of minutes looks like a hang."""

    EVERY = 15.0  # seconds, for the whole process

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), -math.inf

    def say(self, trouble: str, attempts: int, elapsed: float, deadline: float) -> None:
        with self._lock:
            now = time.monotonic()
            if elapsed < self.EVERY or now - self._last < self.EVERY:
                return
            self._last = now
        _log.warning("%s; %d attempts in %.0f s, giving up at %.0f s", trouble, attempts, elapsed, deadline)


_NOTICES = _Notices()
_log = logging.getLogger(__name__)


def _failure(what: str, verdict: _Verdict, attempts: int, elapsed: float) -> DataError:
    tried = "at once" if attempts == 1 else f"after {attempts} attempts in {elapsed:.0f} s"
    kind = ObjectMissing if verdict.missing else DataError
    return kind(f"{what} failed {tried}: {verdict.reason}; {verdict.fix}")


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
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
    "NoCredentialsError",
    "PartialCredentialsError",
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
    """The HTTP status anywhere in the chain: botocore, aiohttp, gcsfs and azure each keep it elsewhere."""
    for link in _chain(error):
        if any(kind.__name__ == "HttpProcessingError" for kind in type(link).__mro__):
            continue  # aiohttp's word for a broken body: its code 400 is nobody's answer
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status", "status_code", "code"):
            if isinstance(value := getattr(link, name, None), int) and 400 <= value < 600:
                return value
    return None


def _tls_fault(error: BaseException) -> ssl.SSLError | None:
    """Why no TLS connection can be had from this server, wherever the libraries above keep it."""
    link: BaseException | None = error
    root: ssl.SSLError | None = None  # the innermost one: aiohttp's own kind wraps any other
    while link is not None:
        root = link if isinstance(link, ssl.SSLError) else root
        link = link.__cause__ or link.__context__
    broken = isinstance(root, _BROKEN_TLS) or getattr(root, "reason", None) in _BROKEN_RECORDS
    return None if broken else root


_BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # like any connection that ends
_BROKEN_RECORDS = {"DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "UNEXPECTED_EOF_WHILE_READING"}


def _code(error: BaseException) -> str | None:
    """S3's own name of the error."""
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((answer.get("Error", {}).get("Code") for answer in responses if isinstance(answer, dict)), None)
