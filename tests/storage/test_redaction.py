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
def test_other_libraries_words_lose_their_secrets(monkeypatch, words):
    monkeypatch.setenv("SOME_SECRET", "envsecretvalue")
    shown = scrub(words)
    assert "secret0123" not in shown
    assert "envsecretvalue" not in shown


def test_plain_words_stay():
    assert scrub("NoSuchKey: The specified key does not exist.") == "NoSuchKey: The specified key does not exist."


LONG = {
    "a word": "y" * 20_000,
    "words with points": "a." * 10_000,
    "protocols of protocols": "a::" * 7_000,
    "2,000 URLs": "a://" * 2_000,
    "marks of a fragment": "http://h" + ";a" * 10_000,
    "encoded marks": "http://h/" + "%3f" * 7_000,
    "a secret's name": "token_" * 4_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_takes_no_square_of_its_length(name):
    began = time.process_time()
    redact(LONG[name])
    redact_text(LONG[name])
    scrub(LONG[name])
    assert time.process_time() - began < 4
