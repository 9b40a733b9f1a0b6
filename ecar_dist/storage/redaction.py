"""Remove secrets from text that is printed, logged or written where others may read it.

    redact        one URL: removes user, password, query string and other signatures
    redact_text   our own text, e.g. a message or a printed command: the URLs in it, and secrets of the environment
    redact_tree   a resolved config or other JSON, value by value: exact, while `redact_text` guesses where a URL ends
    scrub         text of another library: also values that are assigned to a name such as `token`

Our own keys (`flow.token_draws`) are never mistaken for secrets.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

_HIDDEN = "***"
_WORD = r"[A-Za-z][A-Za-z0-9+.\-]{0,30}"  # bounded, like all patterns below: none may take quadratic time
# with one slash: a URL that was given as a path
_SCHEME = re.compile(
    rf"{_WORD}(?:::{_WORD}){{0,4}}://|\b(?i:s3a?|gs|gcs|https?|az|abfss?|s?ftp|hf):/(?=[^/\s])"
    # other schemes only with a user, because "a:/b" may be a path
    rf"|\b{_WORD}:/(?=[^/\s]\S{{0,300}}@)"
)
# the end of a URL in a text is a guess: a password may contain quotes, brackets and spaces
_USER = r"(?:[^\s/@:]*:[^\n/@]*@|[^\s]*@)"
_URL = re.compile(rf"(?:{_SCHEME.pattern}){_USER}?[^\s'\"<>\]]+")
_PORT = re.compile(r"\d*")
_AT = re.compile(r"@|%40", re.IGNORECASE)
# a query string with percent-encoded delimiters; "%3F" alone may be part of a file name
_ENCODED_QUERY = re.compile(r"%3f[^/]{0,500}(?:=|%3d)", re.IGNORECASE)
_NAME = r"signature|token|secret|passw(?:or)?d|credential|access_?key|api_?key|\bsig\b"
_SIGNED_PART = re.compile(rf"[;#&](?:[^/=]{{0,100}}(?:{_NAME})[^/=]{{0,100}})=.*", re.IGNORECASE)
_ASSIGNED = re.compile(rf"([\w-]{{0,100}}(?:{_NAME})\w{{0,100}})\s{{0,9}}[=:]\s{{0,9}}[^\s&,;]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=\-]{8,}", re.IGNORECASE)
_SECRET_KEY = re.compile(rf"(?:{_NAME})$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
_SHORTEST_SECRET = 8


def redact(url: str | Path) -> str:
    """The URL without user, password, query string and signed fragments. A local path is returned unchanged."""
    text = str(url)
    schemes = list(_SCHEME.finditer(text))
    if not schemes:
        return text
    parts = [text[: schemes[0].start()]]
    # each URL of the text separately
    for match, following in itertools.zip_longest(schemes, schemes[1:]):
        rest = text[match.end() : following.start() if following else len(text)].partition("?")[0]
        if (encoded := _ENCODED_QUERY.search(rest)) is not None:
            rest = rest[: encoded.start()]
        parts.append(match[0] + _SIGNED_PART.sub("", _without_user(rest)))
    return "".join(parts)


def _without_user(rest: str) -> str:
    """What follows `scheme://`, without user and password."""
    authority = rest.partition("/")[0]
    # the colons inside the brackets of an IPv6 address do not start a port
    port = authority.rpartition("]")[2].partition(":")[2]
    # a secret key may contain an unescaped slash: then what looks like the port is not a number
    odd_port = not _PORT.fullmatch(port)
    if _AT.search(authority) or (odd_port and _AT.search(rest)):
        return _AT.split(rest)[-1]
    if odd_port:
        return rest.replace(f":{port}", f":{_HIDDEN}", 1)
    return rest


def redact_text(text: str) -> str:
    """Our own text without secrets in URLs and without the values of secret environment variables."""
    return _URL.sub(lambda match: redact(match.group()), _without_variables(text))


def redact_tree(tree: Any, *, variables: bool = True) -> Any:
    """JSON data without secrets in any string. The value of a key with a secret's name (`api_key`) is hidden.

    variables: also remove the values of secret environment variables.
    """
    if isinstance(tree, dict):
        return {
            key: _HIDDEN
            if isinstance(value, str) and value and _SECRET_KEY.search(str(key))
            else redact_tree(value, variables=variables)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redact_tree(value, variables=variables) for value in tree]
    if not isinstance(tree, str):
        return tree
    return redact(_without_variables(tree) if variables else tree)


def scrub(text: str) -> str:
    """Another library's text without secrets in URLs, assigned secrets or values of secret environment variables."""
    return _BEARER.sub(rf"\1 {_HIDDEN}", _ASSIGNED.sub(rf"\1={_HIDDEN}", redact_text(text)))


def _without_variables(text: str) -> str:
    """Without the values of variables with a secret's name. An existing path is kept: it only points to a secret."""
    values = (value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name))
    secrets = {value for value in values if len(value) >= _SHORTEST_SECRET and value in text}
    for secret in sorted(secrets, key=len, reverse=True):
        if not os.path.exists(secret):
            text = text.replace(secret, _HIDDEN)
    return text
