import ssl
import threading
import time

import pytest

from ecar_dist.errors import DataError
from ecar_dist.storage import retries
from ecar_dist.storage.retries import RetryPolicy, Transfer, TransferStats, with_retries


class Clock(threading.Event):
    """Time that passes only in pauses, and where a test moves it; also the event that would end a pause."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def wait(self, timeout=None):
        self.now += timeout
        return self.is_set()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def test_pauses_double_to_their_longest_with_jitter():
    policy = RetryPolicy(first_delay=1.0, longest_delay=10.0)
    for attempt, longest in [(1, 1), (2, 2), (4, 8), (5, 10), (5000, 10)]:
        pauses = [policy.delay(attempt) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 40


def test_the_timeout_of_a_request_grows_with_its_size():
    assert RetryPolicy(request_seconds=5.0, slowest=1000).request_timeout(20_000) == 25.0


def test_the_last_attempt_ends_with_the_deadline(clock):
    given = []

    def attempt(timeout):
        given.append(timeout)
        clock.now += 0.1
        raise ConnectionResetError("reset")

    policy = RetryPolicy(deadline=0.5, request_seconds=0.4, first_delay=0.05, longest_delay=0.05)
    with pytest.raises(DataError, match=r"^reading s3://b/k failed after \d attempts in \d s: ConnectionResetError"):
        with_retries("reading", "s3://b/k", Transfer(policy, stopping=clock), attempt)
    assert given[0] == pytest.approx(0.4, abs=0.01)
    assert given[-1] < 0.3


def test_an_attempt_that_our_deadline_cut_is_not_the_reason():
    def attempt(timeout):
        given.append(timeout)
        raise ConnectionResetError("reset") if len(given) == 1 else TimeoutError

    for errors, reason in [(0, "ConnectionResetError"), (1, "no complete response in time")]:
        given = [0.0] * errors
        with pytest.raises(DataError, match=reason):
            with_retries("reading", "s3://b/k", Transfer(RetryPolicy(deadline=0.2, first_delay=0.05)), attempt)


def test_stopping_ends_a_pause_at_once():
    transfer = Transfer(RetryPolicy(first_delay=60.0, longest_delay=60.0))
    threading.Timer(0.2, transfer.stopping.set).start()
    began = time.monotonic()

    def attempt(timeout):
        raise TimeoutError

    with pytest.raises(DataError, match="was stopped"):
        with_retries("reading", "s3://b/k", transfer, attempt)
    assert time.monotonic() - began < 25


@pytest.mark.parametrize("error", [ValueError("x"), ImportError("x"), PermissionError("x"), KeyError("x")])
def test_mistakes_are_not_retried(error):
    transfer = Transfer()

    def attempt(timeout):
        raise error

    with pytest.raises(DataError, match="at once"):
        with_retries("reading", "s3://b/k", transfer, attempt)
    assert transfer.stats.snapshot()["requests"] == 1


def test_the_cause_counts_and_not_its_wrapper():
    """fsspec's HTTP file system turns a broken connection into FileNotFoundError."""
    outcomes = iter([FileNotFoundError("gone"), None])

    def attempt(timeout):
        if error := next(outcomes):
            raise error from ConnectionResetError("reset")
        return "read"

    assert with_retries("reading", "http://h/k", Transfer(RetryPolicy(first_delay=0.01)), attempt) == "read"


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), True),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), True),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), False),
        (ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed"), False),
    ],
)
def test_a_failed_certificate_is_final_and_a_broken_connection_is_not(clock, error, final):
    def attempt(timeout):
        try:
            raise error
        except ssl.SSLError:
            raise OSError("wrapped by a library without a cause")  # noqa: B904

    transfer = Transfer(RetryPolicy(deadline=0.1, first_delay=0.01), stopping=clock)
    with pytest.raises(DataError) as caught:
        with_retries("reading", "s3://b/k", transfer, attempt)
    assert ("failed at once" in str(caught.value)) == final
    assert ("and its certificate" in str(caught.value)) == final
    assert (str(error) in str(caught.value)) == final


def test_an_error_ends_the_requests_of_other_threads():
    transfer = Transfer()
    with transfer.stopped_by_errors():
        pass
    assert not transfer.stopping.is_set()
    with pytest.raises(KeyboardInterrupt), transfer.stopped_by_errors():
        raise KeyboardInterrupt
    assert transfer.stopping.is_set()


def test_counters_add_up_over_threads():
    stats = TransferStats()

    def count():
        for _ in range(2000):
            stats.add(bytes=2, requests=1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (stats.snapshot()["bytes"], stats.snapshot()["requests"]) == (32_000, 16_000)


def test_lasting_trouble_is_reported_now_and_then_without_secrets(clock, monkeypatch, caplog):
    notices = retries._Notices()
    notices.EVERY = 0.2
    monkeypatch.setattr(retries, "_NOTICES", notices)

    def attempt(timeout):
        raise ConnectionResetError("reset")

    policy = RetryPolicy(deadline=0.7, first_delay=0.01, longest_delay=0.01)
    with pytest.raises(DataError):
        with_retries("reading", "https://u:secret@b/k?sig=hidden", Transfer(policy, stopping=clock), attempt)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("reading https://b/k: ConnectionResetError") for line in lines)
    assert "giving up at 1 s" in lines[0]
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text
