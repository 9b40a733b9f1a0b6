import time

import pytest

from ecar_dist.storage.redaction import redact, redact_text, scrub


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("s3://AKIA:se/cr/et@bucket/a", "s3://bucket/a"),
        ("https://user:secret@host:8080/a/b?X-Amz-Signature=secret&x=y", "https://host:8080/a/b"),
        ("https://secrettoken@host/a", "https://host/a"),
        ("http://host:8080/a@b/c", "http://host:8080/a@b/c"),
        ("s3://bucket/a@b:c/d", "s3://bucket/a@b:c/d"),
        ("/local/path?with=mark", "/local/path?with=mark"),
        ("file:/u:secret@host/a", "file:/host/a"),
        ("jdbc:x:/u:secret@host", "jdbc:x:/host"),
        ("s3://k:secret@b/a,https://h/b?sig=secret", "s3://b/a,https://h/b"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url, shown):
    assert redact(url) == shown


@pytest.mark.parametrize(
    "words",
    [
        "Cannot connect to https://u:secret0123@host/x?sig=secret0123 now",
        "bad request: X-Amz-Signature=secret0123&x=1",
        "token: secret0123",
        "aws_secret_access_key = secret0123",
        "the key envsecretvalue is unknown",
    ],
)
def test_text_of_other_libraries_loses_its_secrets(monkeypatch, words):
    monkeypatch.setenv("SOME_SECRET", "envsecretvalue")
    shown = scrub(words)
    assert "secret0123" not in shown
    assert "envsecretvalue" not in shown


def test_plain_text_is_not_changed():
    assert scrub("NoSuchKey: The specified key does not exist.") == "NoSuchKey: The specified key does not exist."


LONG = ["y" * 25_000, "a::" * 10_000, "s3://" * 5_000, ";" * 25_000, "token" * 2_500, "%3f" * 10_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:5])
@pytest.mark.parametrize("redacted", [redact, redact_text, scrub])
def test_long_texts_take_no_quadratic_time(redacted, text):
    began = time.process_time()
    redacted(f"https://host/set?token=x {text}")
    redacted(f"s3://host/{text}")
    assert time.process_time() - began < 20  # a quadratic pattern takes minutes


def test_each_of_many_urls_is_redacted():
    assert redact("s3://k:SECRET@a https://h/b?sig=SECRET") == "s3://a https://h/b"
    assert "SECRET" not in redact(" ".join(f"s3://k:SECRET@bucket/{i}" for i in range(5000)))


def test_a_url_whose_slash_was_lost_on_the_way_through_a_path():
    for scheme in ("s3", "hdfs", "https", "webhdfs"):
        said = redact_text(f"{scheme}:/key:SECRET@host/set is not a run directory")
        assert said == f"{scheme}:/host/set is not a run directory"
    assert redact_text("a:/b c:/d/e.txt") == "a:/b c:/d/e.txt"
